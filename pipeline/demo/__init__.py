"""The demo: a synthesised corpus, and the whole job and the service on one machine."""
