"""Uses trained models: on photos, folders, tables and shards, from the command line and from Python."""
