"""The steps of the data stage, and the workers that run them."""
