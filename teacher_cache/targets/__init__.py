"""Targets for training: batches, their order within an epoch, and targets computed online without a cache."""
