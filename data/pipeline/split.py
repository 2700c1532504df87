"""Which documents go to validation: whole inputs, and a share of the repositories."""

import fnmatch
import os

from data.documents import Input, fraction


def is_validation(item: Input, val_files: str | None) -> bool:
    """True if the whole input goes to validation: if the glob `val_files` matches its file name (its path, if the glob
    has a slash), or if the dataset's publisher reserves it for validation."""
    pattern = val_files or ""
    name = item.name if "/" in pattern else os.path.basename(item.name)
    return getattr(item, "held_out", False) or fnmatch.fnmatch(name, pattern)


def split_of(key: str, seed: int, val_fraction: float) -> str:
    """The split of a repository or file, from a hash of its name alone: other documents do not change it."""
    return "val" if fraction(f"split {seed} {key}") < val_fraction else "train"
