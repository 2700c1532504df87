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

_TABLE_BITS = 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Needle(NamedTuple):
    problem: str  # the problem's task_id
    text: bytes  # squeezed: lower case, no white space


def squeeze(text: str) -> str:
    """The text in lower case, without white space."""
    return "".join(text.split()).lower()


def needles_of(rows: Iterable[dict[str, Any]], min_chars: int) -> list[Needle]:
    """What to look for, of problems in HumanEval's columns (task_id, prompt, entry_point, canonical_solution) or MBPP's
    (task_id, text or prompt, code). What is shorter than `min_chars`, squeezed, is exempt: `return sum(numbers)` proves
    nothing. Raises ValueError on a row that has none of these columns."""
    needles = []
    for row in rows:
        if not any(isinstance(row.get(key), str) for key in ("prompt", "text", "canonical_solution", "code")):
            raise ValueError(f"problem {row.get('task_id')}: has no prompt, text, canonical_solution or code column")
        problem = str(row.get("task_id", "?"))
        problem = f"MBPP/{problem}" if problem.isdecimal() else problem
        texts = [row.get("canonical_solution"), row.get("code"), row.get("text"), _docstring(row)]
        squeezed = {squeeze(text) for text in texts if text}
        needles += [Needle(problem, text.encode()) for text in sorted(squeezed) if len(text) >= max(8, min_chars)]
    return needles


def _docstring(row: dict[str, Any]) -> str | None:
    """The docstring of the function to complete, as it is written in the source; a prompt that is no code, whole."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or "entry_point" not in row:
        return prompt
    try:
        functions = [node for node in ast.walk(ast.parse(prompt)) if isinstance(node, ast.FunctionDef)]
    except SyntaxError:
        return prompt
    for function in functions:
        strings = [s.value for s in function.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
        if function.name == row["entry_point"] and strings:  # one comes after an import
            return (ast.get_source_segment(prompt, strings[0]) or "").lstrip("rRuU").strip("\"'")
    return None


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
