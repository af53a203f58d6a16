"""Building a cache: fitting the codec, decoding shards, and writing them."""
