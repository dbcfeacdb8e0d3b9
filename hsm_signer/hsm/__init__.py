"""Tokens and keys: the only door to python-pkcs11."""
