"""Training objectives: what a student is asked to match."""
