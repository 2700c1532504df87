"""What is known of a check before it runs."""

import os

import pytest

from evaluation.problems import load_problems
from sandbox.checks import prepare
from sandbox.pool import Sandbox

HUMANEVAL = os.environ.get("HUMANEVAL_FILE")
IN_ONE = {
    "a function of a module": "import math\nmath.sqrt = lambda x: 0",
    "of a module in a package": "import os.path\nos.path.exists = lambda path: True",
    "by another name": "import math as m, sys\nif 1:\n    m.pi = 3",
    "among others": "import sys\nold, sys.stdin = sys.stdin, None",
    "an imported class": "from unittest import TestCase\nTestCase.maxDiff = None",
    "imported in brackets": "from io import (\n    BytesIO,\n    StringIO,\n)\nStringIO.write = print",
    "an item": "import sys\nsys.modules['math'] = None",
    "in place": "import math\nmath.tau += 1",
    "a patch": "from unittest.mock import patch\nwith patch('builtins.input'):\n    f()",
    "the output": "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    f()",
    "the environment": "import os\nos.environ['A'] = 'b'",
    "recursion": "import sys\nsys.setrecursionlimit(100)",
    "the source": "import inspect\ninspect.getsource(f)",
    "an asynchronous loop": "async def g():\n    async for x in f():\n        pass",
}
IN_TWO = {
    "nothing": "",
    "a comparison": "import math\nassert math.pi == f()\nassert math.pi\\\n    == 3",
    "an object of its own": "class A: pass\na = A()\na.x, a.y = 1, 2",
    "an object of the program": "import math\nobj = f()\nobj.x = 1",
    "a keyword": "import math\nf(math.pi, x=1)\nprint(math.e, end='')",
    "a name within another": "patches = environment = unseeded = inspected = 1",
    "a module that it imports": "import random\nrandom.seed(5)\nassert random.random() < 1",
    "a loop within async": "async def g():\n    for x in await f():\n        pass",
}


@pytest.mark.parametrize("text", IN_ONE.values(), ids=IN_ONE)
def test_what_changes_the_interpreter_must_share_the_programs(text):
    assert "the check " in prepare(text).needs_sharing


@pytest.mark.parametrize("text", IN_TWO.values(), ids=IN_TWO)
def test_anything_else_need_not(text):
    assert prepare(text).needs_sharing is None


@pytest.mark.skipif(HUMANEVAL is None, reason="HUMANEVAL_FILE is not set")
def test_no_check_of_humaneval_shares_the_interpreter_of_a_solution():
    problems = load_problems(HUMANEVAL)
    assert [p.task_id for p in problems if prepare(p.check).needs_sharing] == []
    with Sandbox() as sandbox:
        results = dict(sandbox.run_many((p.prompt + p.solution, p.check, p.entry_point) for p in problems))
    assert {(result.passed, result.shared) for result in results.values()} == {(True, False)} and len(results) == 164


IMPORTS = """import math, os.path as p
from io import (
    BytesIO,  # one of them (or so)
    StringIO,
)
from collections import \\
    Counter
import json; import re
def f():
    import sys
'''
from what a check may say
import that
'''
"""


def test_a_program_may_use_every_import_at_the_top_of_its_check():
    names: dict = {}
    for line in prepare(IMPORTS).imports:
        try:
            exec(line, names)
        except (SyntaxError, ImportError):
            continue  # a text
    assert {*names} - {"__builtins__"} == {"math", "p", "BytesIO", "StringIO", "Counter", "json", "re"}


def test_a_check_is_compiled_once_and_one_that_does_not_compile_is_left_to_the_judge():
    first = prepare("assert f(1) == 2")
    assert prepare("".join(["assert ", "f(1) == 2"])) is first
    exec(first.code, {"f": lambda x: 2 * x})
    for wrong in ("x = = 1", "x = '\0'", "x = '\ud800'.\ud800", "(" * 300 + ")" * 300):
        assert prepare(wrong).code == wrong
    with Sandbox(1) as sandbox:
        assert sandbox.run("x = 1\ny = 2", "x = 3\nx = = 1").detail.startswith("line 4: SyntaxError: invalid syntax")
        assert sandbox.run("x = 1", "x = '\0'").outcome == "failed"
