"""Building a cache: the codec's fit, the shard writer, and the Ray Data job around them."""
