"""Building blocks that several kinds of teachers share."""
