"""The corpus: its audio files, their splits, and the index of what can be used."""
