"""Training objectives: what a student learns from the teacher's layers, and how the loss is computed."""
