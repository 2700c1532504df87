"""Decides which documents stay, and what is replaced in them."""
