"""The demo: the whole job on this machine."""
