"""What the loop in train.py calls."""
