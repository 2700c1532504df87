"""What bench.py times."""
