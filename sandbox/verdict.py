"""Limits of a program, and the result of running it: shared by the sandbox and by its fork server."""

from dataclasses import dataclass

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, KILLED = "passed", "failed", "timed out", "out of memory", "killed"
OUTCOMES = (PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, KILLED)
SHARED = "shared"  # Result.error where strict refuses to run check and program in one interpreter
# Imported before any program starts, because programs often use them. Where a program shares an interpreter with its
# check, those that the check names are put back before it.
COMMON = (
    "bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "math", "operator", "random",
    "re", "string", "typing",
)  # fmt: skip
GRACE_S = 1.0  # seconds that output and exit status may take to come after the verdict
PATIENCE = 10  # times its limit that a program may take, if others take its processor
HEADER = ">?QQ"  # of a request, for struct: in one interpreter or not, bytes of the check's half and the program's


@dataclass(frozen=True)
class Limits:
    timeout_s: float = 3.0  # seconds for the whole program, its check included: wall-clock time unless it is starved
    memory_bytes: int = 4 * 2**30  # address space of each process
    file_bytes: int = 64 * 2**20  # of one file and, in namespaces, of all files together
    processes: int = 256  # processes and threads at once
    open_files: int = 256
    output_bytes: int = 2**16  # how much of its output is kept; the rest is read and dropped


@dataclass(frozen=True)
class Result:
    outcome: str  # one of OUTCOMES
    error: str | None = None  # the exception's type, or the signal or exit status that ended the program
    line: int | None = None  # where the exception was raised, counted over program and check as one text
    message: str = ""  # the exception's message
    output: str = ""  # stdout and stderr, interleaved
    seconds: float = 0.0  # wall-clock time
    cpu_seconds: float = 0.0  # processor time of the program's first process and of its judge
    shared: bool = (
        False  # whether the program took part in its verdict: both had to share an interpreter, or two of the
    )
    # program's objects were compared. It may be forged.

    @property
    def passed(self) -> bool:
        return self.outcome == PASSED

    @property
    def detail(self) -> str:
        """What was wrong, on one line: `line 7: IndexError: list index out of range`."""
        parts = [f"line {self.line}" if self.line else "", self.error, self.message]
        text = " ".join(": ".join(part for part in parts if part).split())
        return "".join(c if c.isprintable() else "?" for c in text)  # it may be written to a terminal
