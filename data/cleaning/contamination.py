"""Documents that hold a benchmark's problem: its docstring or text, or its solution.

Compared without case and white space, as a part of the document. For speed each needle is first looked for by eight of
its bytes, at every place of the text at once; where these occur, the whole needle is compared.

Source: StarCoder, which dropped files with HumanEval's docstrings or solutions and MBPP's texts or solutions.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from runtime.errors import UserError

_TABLE_BITS = 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Needle(NamedTuple):
    problem: str  # the problem's task_id
    text: bytes  # squeezed: lower case, no white space


def squeeze(text: str) -> str:
    """The text in lower case, without white space."""
    return "".join(text.split()).lower()


def needles_of(rows: Iterable[dict[str, Any]], min_chars: int, columns: str, name: str) -> list[Needle]:
    """What to look for, of problems in rows of a file `name`: the texts in the comma-separated `columns`; of a `prompt`
    that is code, the docstring of its `entry_point`. What is shorter than `min_chars`, squeezed, is exempt: `return
    sum(numbers)` proves nothing. Raises UserError on a row that has none of the columns."""
    needles = []
    for number, row in enumerate(rows, start=1):
        texts = [row[column] for column in columns.split(",") if isinstance(row.get(column), str)]
        if not texts:
            raise UserError(
                f"{name}, problem {number}: has no column {columns}; name its columns with --contaminant_columns"
            )
        problem = str(row.get("task_id", number))
        if "entry_point" in row and isinstance(row.get("prompt"), str):
            texts = [text for text in texts if text != row["prompt"]] + _docstrings(row["prompt"], row["entry_point"])
        squeezed = sorted({squeeze(text) for text in texts})
        label = problem if "/" in problem else f"{name}/{problem}"
        needles += [Needle(label, text.encode()) for text in squeezed if len(text) >= max(8, min_chars)]
    return needles


def _docstrings(prompt: str, entry_point: str) -> list[str]:
    """The strings that stand in the function to complete, as they are written in the source; a prompt that is no code,
    whole."""
    try:
        functions = [node for node in ast.walk(ast.parse(prompt)) if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError):
        return [prompt]
    body = next((function.body for function in functions if function.name == entry_point), [])
    strings = [s.value for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
    return [(ast.get_source_segment(prompt, string) or "").lstrip("rRuU").strip("\"'") for string in strings[:1]]


class Decontaminator:
    """Finds the problems that a text holds."""

    def __init__(self, needles: list[Needle]):
        self.by_anchor: defaultdict[int, list[Needle]] = defaultdict(list)
        for needle in needles:
            middle = (len(needle.text) - 8) // 2
            self.by_anchor[int.from_bytes(needle.text[middle : middle + 8], "little")].append(needle)
        self.anchors = np.array(sorted(self.by_anchor), dtype=np.uint64)
        self.table = np.zeros(2**_TABLE_BITS, dtype=bool)  # a first sieve, small enough for the cache
        self.table[self._places(self.anchors)] = True

    def problems(self, squeezed: str) -> list[str]:
        """The problems whose needles occur in a squeezed text, sorted."""
        data = squeezed.encode()
        candidates: set[int] = set()
        for shift in range(min(8, max(0, len(data) - 7))):
            windows = np.frombuffer(data, "<u8", offset=shift, count=(len(data) - shift) // 8)
            windows = windows[self.table[self._places(windows)]]
            candidates.update(windows[np.isin(windows, self.anchors)].tolist())
        needles = (needle for anchor in candidates for needle in self.by_anchor[anchor])
        return sorted({needle.problem for needle in needles if needle.text in data})

    @staticmethod
    def _places(windows: np.ndarray) -> np.ndarray:
        return ((windows * _FACTOR) >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
