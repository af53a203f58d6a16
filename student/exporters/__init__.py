"""Exporters to S3PRL, Hugging Face, ONNX and `torch.export`, all from one plain PyTorch form of the student."""
