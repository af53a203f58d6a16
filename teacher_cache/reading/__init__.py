"""How a reader opens a cache: its utterances and commit records as columns, and its files, from local copies if there are any."""
