"""Plans made before any work: what a run would do, and what a cache costs on this machine and on a cluster."""
