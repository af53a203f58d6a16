"""A cache on disk: where it lies, what it is, its plan of shards, its records and its lock."""
