"""The verdicts of the fork server, and how a check finds names and modules."""

import ast
import json
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "sandbox")  # it is a script, whose imports are flat
    from forkserver import _CheckBuiltins, _imports, _verdict

SECRET = b"s" * 32


def status(code: int = 0, signum: int = 0) -> int:
    return code << 8 | signum


@pytest.mark.parametrize(
    ("said", "ended", "outcome", "error"),
    [
        (SECRET + SECRET, status(), "passed", None),
        (SECRET + SECRET + b"more", None, "passed", None),
        (SECRET + b"t" * 32, status(), "failed", "report"),
        (SECRET, status(), "failed", "exit"),
        (SECRET, status(7), "failed", "exit"),
        (SECRET, None, "timed out", None),
        (SECRET, status(signum=signal.SIGKILL), "killed", "SIGKILL"),
        (SECRET, status(signum=signal.SIGXCPU), "timed out", "SIGXCPU"),
        (SECRET + b'{"error": "MemoryError", "line": 1, "message": ""}', status(1), "out of memory", "MemoryError"),
        (SECRET + b'{"error": "E", "line": "x", "message": ""}', status(1), "failed", "report"),
        (SECRET + b"[1]", status(1), "failed", "report"),
        (b"", status(1), "killed", "sandbox"),
    ],
)
def test_the_verdict_follows_from_what_was_sent_and_how_the_program_ended(said, ended, outcome, error):
    verdict = _verdict(said, ended)
    assert (verdict["outcome"], verdict.get("error")) == (outcome, error)
    json.dumps(verdict)


def test_a_check_finds_builtins_before_the_programs_names():
    names = {"abs": len, "mine": 1}
    check_builtins = _CheckBuiltins({"abs": abs})
    check_builtins.program_names = names
    globals_ = {"__builtins__": check_builtins}
    exec("found = abs(-3), mine", globals_)
    assert globals_["found"] == (3, 1)
    names["mine"] = 2
    exec("found = mine", globals_)
    assert globals_["found"] == 2


def test_the_imports_of_a_check_are_found_at_its_top_level_and_everywhere():
    statements, imports = _imports("import os\nfrom math import pi as p\ndef f():\n    import sys\nx = 'import this'")
    exec(compile(ast.Module(statements, []), "", "exec"), names := {})
    assert names["os"] is os and "p" in names and "sys" not in names and "f" not in names
    assert [getattr(node, "module", None) or node.names[0].name for node in imports] == ["os", "math", "sys"]
    assert _imports("x = 1") == ([], [])
