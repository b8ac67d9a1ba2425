"""Writes shards: of folders, of tables, of other shards."""
