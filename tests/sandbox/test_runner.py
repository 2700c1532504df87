"""What the program's process does for its judge."""

import code
import contextlib
import io
import marshal

import pytest

from sandbox.judge import Judge
from sandbox.runner import run_program


@pytest.fixture
def start(connect):
    """A function that runs a program with the imports of its check, and returns its judge."""

    def start(program: str, imports: tuple[str, ...] = ()) -> Judge:
        judge = connect(lambda end: run_program(end, marshal.dumps((program, [*imports])), "/"))
        judge.greet()
        judge.ask("run")
        return judge

    return start


SOURCES = [
    "1 + 1", "None", "print('a'); 'é'", "for i in range(3): i\n", "y = 3; y", "print('a'); [][5]",
    "raise SystemExit(4)", "raise KeyError", "x y", "raise Own('it')",
    "[Own] + [1]", "1 / 0 # nothing", "if 1:\n    5\n", "exit",
]  # fmt: skip
PROGRAM = "class Own(Exception): pass\n"


def test_a_line_shows_what_the_interactive_interpreter_shows(start):
    judge = start(PROGRAM)
    interpreter = code.InteractiveInterpreter({"__name__": "program"})
    interpreter.runsource(PROGRAM, symbol="exec")
    for source in SOURCES:
        printed, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(error):
            try:
                interpreter.runsource(source)
            except SystemExit as leaves:
                error.write(f"SystemExit: {leaves}\n")
        got, got_error = judge.ask("display", source + "\n")
        assert got == printed.getvalue(), source
        assert (got_error or "\n").splitlines()[-1:] == (error.getvalue() or "\n").splitlines()[-1:], source


def test_a_line_shows_the_same_whatever_the_program_did_to_the_streams(start):
    judge = start("import sys\nsys.displayhook = lambda x: None\nsys.stdout = sys.stderr = None\ndef f(): print('a')")
    assert judge.ask("display", "f(); 5") == ("a\n5\n", None)


FORKS = """
import os
def fork(then):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    then()
def back(): return fork(lambda: None)
def raises(): return fork(lambda: 1 / 0)
def leaves(): return fork(exit)
def loops():
    for i in range(3): yield fork(lambda: None)
"""


def test_a_process_that_the_program_forked_ends_where_it_comes_back(start):
    judge = start(FORKS)
    names = {"__builtins__": judge.builtins_of_check("")}
    for call in ("back()", "raises()", "leaves()", "sum(loops())"):
        exec(f"assert {call} == 0 and back() == 0", names)
    assert judge.ask("display", "back()") == ("0\n", None)
    assert judge.fault is None


def test_the_imports_of_its_check_are_lent_to_the_program_after_it_has_run(start):
    judge = start(
        "try:\n    math\nexcept NameError:\n    early = False\npi = 3\ndef f(): return pi, sys",
        ("import math", "import nosuch", "from math import (\n    pi,\n)", "from here on", "import sys"),
    )
    assert judge.look_up("early") is False
    assert judge.ask("display", "f()[0], math.e > 2, f()[1].__name__") == ("(3, True, 'sys')\n", None)
