"""Looking after a finished cache: what it is, whether it is sound, and its repair."""
