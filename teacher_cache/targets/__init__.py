"""Targets for training: the batches, their order, and the teacher in the loop as an alternative to a cache."""
