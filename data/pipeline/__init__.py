"""The data stage, step by step."""
