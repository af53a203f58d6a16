"""The model side of the service: backends, the batching engine, loaded models, windows."""
