"""Finds documents that contain a benchmark problem: its docstring, its text or its solution.

A problem's strings, the needles, are searched for in the document, both without case and white space. For speed eight
bytes of each needle are looked up first, at all positions at once. The whole needle is compared only where they occur.

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
    """The needles of the problems in the rows of a file `name`: the texts in the comma-separated `columns`, but of a
    `prompt` that is code only the docstring of its `entry_point`. Squeezed texts shorter than `min_chars` are left out,
    because `return sum(numbers)` proves nothing. Raises UserError on a row that has none of the columns."""
    needles = []
    for number, row in enumerate(rows, start=1):
        texts = [row[column] for column in columns.split(",") if isinstance(row.get(column), str)]
        if not texts:
            raise UserError(f"{name}, problem {number}: has none of the columns {columns}; set --contaminant_columns")
        problem = str(row.get("task_id", number))
        if "entry_point" in row and isinstance(row.get("prompt"), str):
            texts = [text for text in texts if text != row["prompt"]] + _docstrings(row["prompt"], row["entry_point"])
        squeezed = sorted({squeeze(text) for text in texts})
        label = problem if "/" in problem else f"{name}/{problem}"
        needles += [Needle(label, text.encode()) for text in squeezed if len(text) >= max(8, min_chars)]
    return needles


def _docstrings(prompt: str, entry_point: str) -> list[str]:
    """The docstring of the function to complete, as written in the source; the whole prompt if it is not code. Returns
    a list of one string, or an empty one."""
    try:
        functions = [node for node in ast.walk(ast.parse(prompt)) if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError):
        return [prompt]
    body = next((function.body for function in functions if function.name == entry_point), [])
    strings = [s.value for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
    return [(ast.get_source_segment(prompt, string) or "").lstrip("rRuU").strip("\"'") for string in strings[:1]]


class Decontaminator:
    """Finds the problems that a text contains."""

    def __init__(self, needles: list[Needle]):
        self.by_anchor: defaultdict[int, list[Needle]] = defaultdict(list)
        for needle in needles:
            middle = (len(needle.text) - 8) // 2
            self.by_anchor[int.from_bytes(needle.text[middle : middle + 8], "little")].append(needle)
        self.anchors = np.array(sorted(self.by_anchor), dtype=np.uint64)
        self.table = np.zeros(2**_TABLE_BITS, dtype=bool)  # a first test, small enough for the processor's cache
        self.table[self._slots(self.anchors)] = True

    def problems(self, squeezed: str) -> list[str]:
        """The problems whose needles occur in a squeezed text, sorted."""
        data = squeezed.encode()
        candidates: set[int] = set()
        for shift in range(min(8, max(0, len(data) - 7))):
            windows = np.frombuffer(data, "<u8", offset=shift, count=(len(data) - shift) // 8)
            windows = windows[self.table[self._slots(windows)]]
            candidates.update(windows[np.isin(windows, self.anchors)].tolist())
        needles = (needle for anchor in candidates for needle in self.by_anchor[anchor])
        return sorted({needle.problem for needle in needles if needle.text in data})

    @staticmethod
    def _slots(windows: np.ndarray) -> np.ndarray:
        """The index into `table` of each window."""
        return ((windows * _FACTOR) >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
