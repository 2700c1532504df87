"""Weights on disk: checkpoints."""
