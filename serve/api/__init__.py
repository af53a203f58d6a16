"""The HTTP side of the service: requests, responses, errors and admission."""
