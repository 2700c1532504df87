"""What a program may use, and what became of it: what the sandbox and the process that runs programs both know."""

from dataclasses import dataclass

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, KILLED = OUTCOMES = (
    *("passed", "failed", "timed out", "out of memory", "killed"),
)
# Imported before programs run, because they often import them. What a check names of these is put back before it runs.
COMMON = (
    *("bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "math", "operator", "random"),
    *("re", "string", "typing"),
)
GRACE_S = 1.0  # after a program has passed, for what it printed


@dataclass(frozen=True)
class Limits:
    timeout_s: float = 3.0  # wall-clock seconds for the whole program, its check included
    memory_bytes: int = 4 * 2**30  # address space of each process
    file_bytes: int = 64 * 2**20  # of a file and, in namespaces, of all files
    processes: int = 64  # processes and threads at once
    open_files: int = 64
    output_bytes: int = 2**16  # kept of what it prints; the rest is read and forgotten


@dataclass(frozen=True)
class Result:
    outcome: str  # one of OUTCOMES
    error: str | None = None  # the exception's type, or the signal or status that ended it
    line: int | None = None  # of program and check as one text, where the exception was raised
    message: str = ""  # the exception's
    output: str = ""  # stdout and stderr, together
    seconds: float = 0.0  # of the clock
    cpu_seconds: float = 0.0  # of the processor, of the program's first process

    @property
    def passed(self) -> bool:
        return self.outcome == PASSED

    @property
    def detail(self) -> str:
        """What was wrong, on one line: `line 7: IndexError: list index out of range`."""
        where = f"line {self.line}: " if self.line else ""
        text = " ".join((where + ": ".join(filter(None, (self.error, self.message)))).split())
        return "".join(c if c.isprintable() else "?" for c in text)  # it may be written to a terminal
