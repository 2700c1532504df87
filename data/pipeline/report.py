"""What a preparation prints and reports: its progress, report.json, tables, and the examples of a dry run."""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cleaning.filters import FILTERS, TOKEN_FILTERS
from data.pipeline.assemble_shards import BEYOND, EXACT, KEPT, NEAR, STATUS
from data.pipeline.machines import read_json

STEPS = ("read", "clean", "decontaminate", "redact", "tokenize")  # steps that drop documents, in order
CHOICES = ((EXACT, "without exact duplicates"), (NEAR, "without near duplicates"), (BEYOND, "max_tokens"))


def sum_up(notes: list[dict[str, Any]], rows: np.ndarray, status: np.ndarray) -> dict[str, Any]:
    """The tallies of all units added up, and what was chosen: documents, bytes and tokens after every step, seconds,
    rejections by reason, benchmark problems found, redactions by kind, and for each language what was read and kept."""
    steps = [{"step": step, **_total(note["steps"].get(step, {}) for note in notes)} for step in STEPS]
    steps[-1]["tokens"] = int(rows["tokens"].sum(dtype=np.int64))
    rejected = _total(note["rejected"] for note in notes)
    chosen = status == KEPT
    left = np.ones(len(rows), dtype=bool)
    for choice, step in CHOICES:
        dropped = status == choice
        left &= ~dropped
        if dropped.any():
            rejected[STATUS[choice]] = int(dropped.sum())
            steps.append({"step": step, **_sizes(rows[left])})
    return {
        "steps": [*steps, {"step": "shards", **_sizes(rows[chosen], rows["copies"][chosen].astype(np.int64))}],
        "seconds": {step: round(s, 3) for step, s in _total(note["seconds"] for note in notes).items()},
        "rejected": rejected,
        "problems": _total(note["problems"] for note in notes),
        "redacted": _total(note["redacted"] for note in notes),
        "languages": _languages(notes, rows, chosen),
    }


def report_table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{'after':30} {'documents':>12} {'bytes':>16} {'tokens':>14}"]
    for step in report["steps"]:
        tokens = f" {step['tokens']:14,}" if "tokens" in step else ""
        lines.append(f"{step['step']:30} {step.get('documents', 0):12,} {step.get('bytes', 0):16,}{tokens}")
    lines += [f"dropped, {reason}: {count:,}" for reason, count in sorted(report["rejected"].items())]
    lines += [f"redacted, {kind}: {count:,}" for kind, count in sorted(report["redacted"].items())]
    problems = sorted(report["problems"].items(), key=lambda item: (-item[1], item[0]))
    if problems:
        most = ", ".join(f"{problem} {count}" for problem, count in problems[:10])
        lines.append(f"benchmark problems found: {len(problems)}, most often {most}")
    if len(report["languages"]) > 1:
        lines.append(f"{'language':20} {'read':>12} {'kept':>12} {'tokens':>14} {'bytes/token':>12}")
        lines += [
            f"{name:20} {of['read']['documents']:12,} {of['kept']['documents']:12,} {of['kept']['tokens']:14,} "
            f"{of['kept']['bytes'] / max(1, of['kept']['tokens']):12.2f}"
            for name, of in sorted(report["languages"].items())
        ]
    seconds = ", ".join(f"{step} {s:.1f}" for step, s in report["seconds"].items())
    return "\n".join([*lines, f"seconds of all workers together: {seconds}"])


def print_summary(path: Path, meta: dict[str, Any]) -> None:
    """Prints the report of the shards in `path`, if they have one, and the size of each split."""
    if (path / "report.json").exists():
        summary = read_json(path / "report.json")
        print(report_table(summary))
        for name, bytes_per_token in summary["tokenizers"].items():
            print(f"tokenizer {name}: {bytes_per_token:.3f} bytes per token on held-out text")
    print(f"{path}: tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids")
    for split, total in meta["splits"].items():
        print(
            f"  {split:5} {total['documents']:>9,} documents {total['tokens']:>13,} tokens {total['bytes']:>14,} bytes"
            f"  {total['bytes'] / total['tokens']:.2f} bytes per token"
        )


def examples(cases: dict[str, list[tuple[str, str]]], rejected: dict[str, int], n_documents: int) -> str:
    """What a dry run shows: each reason, how often it occurred, and how the first cases begin."""
    filters = [*FILTERS, *TOKEN_FILTERS]
    lines = []
    for reason in sorted(cases, key=lambda reason: (reason not in filters, reason)):
        count = rejected[reason]
        lines.append(f"\n{reason}: {count:,} of {n_documents:,} ({count / max(1, n_documents):.1%})")
        for where, text in cases[reason]:
            lines.append(f"  {where}")
            lines += [f"    | {line[:110]}" for line in text.splitlines()[:4]]
    return "\n".join(lines) or "nothing was dropped"


def progress_bar(what: str, total: int) -> tqdm:
    """A bar that counts bytes."""
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file gets few lines
    tqdm.monitor_interval = 0  # no monitor thread: the workers are forked
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, mininterval=interval)


class Progress:
    """Moves a bar by the bytes read; returns whether to go on. It asks `is_enough` at most once per second."""

    def __init__(self, bar: tqdm, is_enough: Callable[[], bool]):
        self.bar, self.is_enough = bar, is_enough
        self.asked_at = time.monotonic()

    def __call__(self, n_bytes: int) -> bool:
        self.bar.update(n_bytes)
        if time.monotonic() < self.asked_at + 1:
            return True
        self.asked_at = time.monotonic()
        return not self.is_enough()


def _total(counters: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(total)


def _sizes(rows: np.ndarray, copies: np.ndarray | int = 1) -> dict[str, int]:
    """Documents, bytes and tokens of some rows, each counted `copies` times."""
    columns = {"documents": np.ones(len(rows)), "bytes": rows["bytes"], "tokens": rows["tokens"]}
    return {name: int((column.astype(np.int64) * copies).sum()) for name, column in columns.items()}


def _languages(notes: list[dict[str, Any]], rows: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """For each language, the documents and bytes read, and the documents, bytes and tokens kept."""
    read: defaultdict[str, Counter[str]] = defaultdict(Counter)
    kept: defaultdict[str, Counter[str]] = defaultdict(Counter)
    start = 0
    for note in notes:
        unit = slice(start, start + note["documents"])
        start = unit.stop
        for language, counts in note["languages"].items():
            read[language].update(counts)
        for group, (_, language) in enumerate(note["groups"]):
            some = rows[unit][chosen[unit] & (rows["group"][unit] == group)]
            kept[language].update(_sizes(some, some["copies"].astype(np.int64)))
    none = {"documents": 0, "bytes": 0}
    return {
        language: {"read": {**none, **read[language]}, "kept": {**none, "tokens": 0, **kept[language]}}
        for language in {**read, **kept}
    }
