"""Where the audio of an utterance is: a file, a piece of a file, a range of its bytes, or a row of a Parquet file."""
