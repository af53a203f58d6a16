"""One optimiser step: what it changes, the memory that it takes, and the largest batch for which that is enough."""
