"""Structured pruning: gates that close while a student is distilled, and the removal of what they closed."""
