"""Training: settings, training loop, optimiser, prefetch of batches, checkpoints, metrics and Ray Train."""
