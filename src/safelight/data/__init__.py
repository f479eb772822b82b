"""Pictures with their words: the procedural world, folders and shards."""
