"""Formats of Hugging Face: datasets and audio folders."""
