"""Ablations: a grid of runs that train from one cache."""
