"""What a cache will cost, on this machine and on a cluster."""
