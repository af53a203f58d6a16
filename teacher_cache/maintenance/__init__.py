"""Maintenance of a cache: showing what it holds, verifying it and repairing it."""
