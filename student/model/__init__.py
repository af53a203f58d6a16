"""The student's architecture, in plain PyTorch."""
