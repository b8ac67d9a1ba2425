"""Reads and writes shards, images, labels and their indexes."""
