"""Kernels that torch does not have, or that are faster than torch's."""
