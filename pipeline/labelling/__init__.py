"""Lets a teacher label shards, audits it, and reuses what is labelled."""
