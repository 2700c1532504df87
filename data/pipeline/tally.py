"""What became of the documents of a unit: counts, and a few examples of each rejection."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data.documents import Document, utf8_bytes


class Tally:
    """Counts that add up over units, and the first three cases of each rejection."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()  # by step
        self.steps: dict[str, Counter[str]] = {}  # documents and bytes that each step let through
        self.rejected: Counter[str] = Counter()  # documents, by reason
        self.problems: Counter[str] = Counter()  # documents that hold a benchmark problem, by problem
        self.redacted: Counter[str] = Counter()  # replaced passages, by kind
        self.languages: dict[str, Counter[str]] = {}  # documents and bytes read
        self.cases: dict[str, list[tuple[str, str]]] = {}  # by reason: where, and how the text begins

    def reject(self, reason: str, where: str, text: str = "") -> None:
        self.rejected[reason] += 1
        cases = self.cases.setdefault(reason, [])
        if len(cases) < 3:
            cases.append((where, text[:400]))

    def drop(self, reason: str, document: Document, detail: str = "") -> None:
        self.reject(reason, f"{document.repo}: {document.path}{detail}", document.text)

    def passed(self, step: str, documents: list[Document]) -> None:
        n_bytes = sum(utf8_bytes(document.text) for document in documents)
        self.steps.setdefault(step, Counter()).update(documents=len(documents), bytes=n_bytes)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        t0 = time.perf_counter()
        yield
        self.seconds[step] += time.perf_counter() - t0

    def counts(self) -> dict[str, Any]:
        """Everything but the cases, for the unit's note."""
        return {name: value for name, value in vars(self).items() if name != "cases"}
