"""Programs that are right pass, in two processes wherever their checks let them.

right_programs.txt holds them. Programs whose modules are not installed are left out.
"""

import importlib.util
import re
import sys
from typing import NamedTuple

import pytest
from program_files import sections

from sandbox.pool import Sandbox
from sandbox.verdict import Limits

OPTIONAL = ("numpy", "pandas", "sympy")
SHARED = {"": (False,), "shared": (True,), "either": (False, True)}  # by what the heading says


class Right(NamedTuple):
    name: str
    program: str
    check: str
    entry_point: str
    shared: str  # one of SHARED


def right_programs() -> list[Right]:
    """Those for which this machine has the modules."""
    found = []
    for heading, (program, check) in sections("right_programs.txt"):
        heading, _, shared = heading.partition(" -> ")
        name, _, entry_point = heading.partition(" | entry: ")
        found.append(Right(name, program, check, entry_point, shared))
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    return [p for p in found if not re.search(rf"\b({'|'.join(missing)})\b", p.program + p.check) or not missing]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the confinement is Linux's")
@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
def test_right_programs_pass(slow):
    programs = [p for p in right_programs() if p.name.startswith("slow: ") == slow]
    with Sandbox(2, Limits(timeout_s=3.0 if slow else 5.0)) as sandbox:
        if sandbox.missing:
            pytest.skip(f"this machine lacks {sandbox.missing}")
        results = dict(sandbox.run_many((p.program, p.check, p.entry_point) for p in programs))
    assert {programs[i].name: result.detail for i, result in results.items() if not result.passed} == {}
    wrong = {programs[i].name: r.shared for i, r in results.items() if r.shared not in SHARED[programs[i].shared]}
    assert wrong == {}, "in one interpreter or two?"


def test_all_right_programs_are_there():
    programs = right_programs()
    assert len({p.name for p in programs}) == len(programs) > 130
    assert sum(p.shared == "shared" for p in programs) > 5 and sum(p.name.startswith("slow: ") for p in programs) == 2
