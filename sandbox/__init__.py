"""Runs untrusted programs in confined processes and judges them."""
