"""A cache on disk or in an object store: files, identity, plan of shards, records and lock."""
