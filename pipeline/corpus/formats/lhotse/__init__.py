"""Formats of Lhotse: manifests and Shar."""
