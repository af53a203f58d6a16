"""The model side of the service: backends, the batching engine, loaded models and windows of long audio."""
