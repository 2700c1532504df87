"""Kernels that torch lacks or that are faster here."""
