"""The training loop and what it needs: settings, optimiser, data prefetch, checkpoints, metrics, Ray Train."""
