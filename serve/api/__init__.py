"""The HTTP side of the service: requests, answers, errors, limits."""
