"""No program passes a check without being right, whatever protection is missing and whoever runs the sandbox.

cheating_programs.txt holds the programs and their checks. Most checks come with a program that is right.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from program_files import sections

ROOT = Path(__file__).parents[2]
CHECK = "def check(candidate):\n    for i in range(5):\n        assert abs(candidate(i) - 2 * i) < 1\ncheck(double)"
NOBODY = 65534
# Runs in a process of its own, as the user that it is given. Prints each result.
RUN = """
import importlib.util, json, re, sys
from sandbox.pool import Sandbox
from sandbox.verdict import Limits
programs, without = json.load(sys.stdin)
there = {name for name in ("numpy", "pandas", "sympy") if importlib.util.find_spec(name)}
is_there = [{*re.findall(r"\\b(?:numpy|pandas|sympy)\\b", " ".join(program))} <= there for program in programs]
limits = Limits(timeout_s=0.7, memory_bytes=2**30)
with Sandbox(2, limits, preload=there & {"numpy"}, without=without) as sandbox:
    runs = [index for index, is_run in enumerate(is_there) if is_run]
    results = {runs[i]: (r.passed, r.shared, r.detail) for i, r in sandbox.run_many(programs[index] for index in runs)}
    print(json.dumps(results))
"""
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the confinement is Linux's")


class Cheat(NamedTuple):
    name: str
    program: str
    check: str
    right: str  # a program that passes the check; may be missing


def cheats() -> list[Cheat]:
    found = []
    for name, parts in sections("cheating_programs.txt"):
        program, check, right = (*parts, "", "")[:3]
        cases = re.search(r"\((\d+) cases\)$", name)
        for case in range(int(cases[1]) if cases else 1):
            found.append(Cheat(name, program, (check or CHECK).replace("CASE", str(case)), right))
    return found


@functools.cache
def interpreter(user: int | None) -> str:
    """An interpreter that `user` may run: ours may be in the home of root."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            subprocess.run([python, "-c", "import sys; assert sys.version_info >= (3, 10)"], user=user, check=True)
            return python
        except (OSError, subprocess.CalledProcessError):
            continue
    pytest.skip(f"there is no Python that user {user} may run")


def run(programs: list[tuple[str, str, str]], without: list[str], user: int | None = None) -> dict[int, tuple]:
    """Returns (passed, shared, detail) of each program for which this machine has the modules."""
    message = json.dumps([programs, without])
    command = [interpreter(user), "-c", RUN]
    as_user = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    done = subprocess.run(command, input=message, capture_output=True, text=True, cwd=ROOT, **as_user)
    assert done.returncode == 0, done.stderr
    return {int(index): result for index, result in json.loads(done.stdout).items()}


@pytest.mark.parametrize("user", [None, NOBODY], ids=["this user", "an ordinary user"])
@pytest.mark.parametrize("without", [[], ["seccomp"], ["namespaces"]], ids=["all", "no seccomp", "no namespaces"])
def test_no_program_passes_that_is_not_right(without, user):
    if user is not None and (os.getuid() != 0 or without == ["seccomp"]):
        pytest.skip("only root can become another user" if os.getuid() else "the same as for root")
    programs = cheats()
    right = ("def double(n):\n    return 2 * n\n", CHECK, "double")
    results = run([right, *((p.program, p.check, "double") for p in programs)], without, user)
    assert results[0][0], "the right one"
    assert {programs[index - 1].name for index, result in results.items() if index and result[0]} == set()


def test_their_checks_are_passed_by_programs_that_are_right():
    programs = [*{p.name: p for p in cheats() if p.right}.values()]
    results = run([(p.right, p.check, "double") for p in programs], [])
    wrong = {programs[index].name: detail for index, (passed, _, detail) in results.items() if not passed}
    assert wrong == {}
    shared = {programs[index].name for index, (_, shared, _) in results.items() if shared}
    assert shared == {p.name for p in programs if p.name.startswith("shared: ")}
    assert len(programs) > 100


def test_all_cheats_are_there():
    programs = cheats()
    assert len({p.name for p in programs}) > 190 and len({*programs}) == len(programs) > 240
    assert sum(p.name.startswith("minimal: ") for p in programs) == 7
