"""Architecture of the student, in plain PyTorch."""
