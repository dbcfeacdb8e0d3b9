"""Access tokens: the only door to urllib3 and requests."""
