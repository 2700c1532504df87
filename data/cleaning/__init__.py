"""Functions of documents: which stay, and as what."""
