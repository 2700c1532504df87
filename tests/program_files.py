"""The collections of programs in tests/sandbox: text files of sections, each with a heading."""

import re
from pathlib import Path


def sections(name: str) -> list[tuple[str, list[str]]]:
    """The heading of each section of a file, and its parts, which lines such as `#---- check` divide."""
    text = (Path(__file__).parent / "sandbox" / name).read_text(encoding="utf-8")
    found = []
    for section in re.split(r"^#### ", text, flags=re.MULTILINE)[1:]:
        heading, _, rest = section.partition("\n")
        found.append((heading, re.split(r"\n#---- \w+\n", rest)))
    return found
