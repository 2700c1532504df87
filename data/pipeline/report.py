"""What a preparation says: its progress, report.json and the table of it, and a dry run's examples."""

import sys
from collections import Counter
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cleaning.filters import FILTERS, TOKEN_FILTERS
from data.pipeline.assemble_shards import BEYOND, EXACT, KEPT, NEAR, STATUS

CHOICES = (EXACT, NEAR, BEYOND)


def sum_up(notes: list[dict[str, Any]], rows: np.ndarray, status: np.ndarray) -> dict[str, Any]:
    """The tallies of all units as one, and what choosing did: documents, bytes and tokens after every step, seconds,
    rejections by reason, benchmark problems found, redactions by kind, and each language's way."""
    steps = [{"step": step, **_total(note["steps"].get(step, {}) for note in notes)} for step in _STEPS]
    steps[-1]["tokens"] = int(rows["tokens"].sum(dtype=np.int64))
    rejected = _total(note["rejected"] for note in notes)
    chosen = status == KEPT
    left = np.ones(len(rows), dtype=bool)
    for choice in CHOICES:
        dropped = status == choice
        left &= ~dropped
        if dropped.any():
            rejected[STATUS[choice]] = int(dropped.sum())
            steps.append(
                {"step": f"without {STATUS[choice]}s" if choice != BEYOND else "max_tokens", **_sizes(rows[left])}
            )
    weighted = rows[chosen]
    return {
        "steps": [*steps, {"step": "shards", **_sizes(weighted, weighted["copies"].astype(np.int64))}],
        "seconds": {step: round(s, 3) for step, s in _total(note["seconds"] for note in notes).items()},
        "rejected": rejected,
        "problems": _total(note["problems"] for note in notes),
        "redacted": _total(note["redacted"] for note in notes),
        "languages": _languages(notes, rows, chosen),
    }


def report_table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{'after':30} {'documents':>12} {'bytes':>16} {'tokens':>14}"]
    lines += [
        f"{step['step']:30} {step.get('documents', 0):12,} {step.get('bytes', 0):16,} {step.get('tokens', ''):>14,}"
        if "tokens" in step
        else f"{step['step']:30} {step.get('documents', 0):12,} {step.get('bytes', 0):16,}"
        for step in report["steps"]
    ]
    for title, key in (("dropped", "rejected"), ("redacted", "redacted")):
        lines += [f"{title}, {reason}: {count:,}" for reason, count in sorted(report[key].items())]
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
    return "\n".join([*lines, f"seconds of the workers: {seconds}"])


def examples(cases: dict[str, list[tuple[str, str]]], rejected: dict[str, int], n_documents: int) -> str:
    """What a dry run shows: each reason, how often, and how the first cases begin."""
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
    tqdm.monitor_interval = 0  # no thread: the workers are forked beside it
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, mininterval=interval)


_STEPS = ("read", "clean", "decontaminate", "redact", "tokenize")


def _total(counters: Any) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(total)


def _sizes(rows: np.ndarray, copies: np.ndarray | int = 1) -> dict[str, int]:
    return {
        "documents": int((np.ones(len(rows), np.int64) * copies).sum()),
        "bytes": int((rows["bytes"].astype(np.int64) * copies).sum()),
        "tokens": int((rows["tokens"].astype(np.int64) * copies).sum()),
    }


def _languages(notes: list[dict[str, Any]], rows: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    languages: dict[str, Any] = {}
    start = 0
    for note in notes:
        for language, counts in note["languages"].items():
            of = languages.setdefault(language, {"read": Counter(), "kept": Counter()})
            of["read"].update(counts)
        of_unit = rows[start : start + note["documents"]]
        kept = chosen[start : start + note["documents"]]
        start += note["documents"]
        for group, (_, language) in enumerate(note["groups"]):
            mask = kept & (of_unit["group"] == group)
            of = languages.setdefault(language, {"read": Counter(documents=0, bytes=0), "kept": Counter()})
            of["kept"].update(_sizes(of_unit[mask], of_unit["copies"][mask].astype(np.int64)))
    empty = {"documents": 0, "bytes": 0, "tokens": 0}
    return {name: {"read": dict(of["read"]), "kept": {**empty, **of["kept"]}} for name, of in languages.items()}
