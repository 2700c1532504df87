"""How good a model is: its likelihood of held-out text, and whether its programs run."""
