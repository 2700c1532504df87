"""What bench.py times, in processes that take turns; and a benchmark of the data stage."""
