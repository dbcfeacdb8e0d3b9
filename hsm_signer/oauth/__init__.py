"""Access tokens: the only door to requests."""
