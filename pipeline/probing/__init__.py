"""Linear probes: what frozen features tell."""
