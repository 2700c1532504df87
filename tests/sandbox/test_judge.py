"""What a check can conclude from its program, and what it leaves to the next check of the same judge."""

import json
import marshal
import math
import os
import socket
import struct
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sandbox.judge import Judge, NeedsSharing, _serve_check
from sandbox.pool import Sandbox
from sandbox.runner import run_program
from sandbox.verdict import HEADER

Start = Callable[[str], Judge]


@pytest.fixture
def start(connect) -> Start:
    """A function that runs a program, and returns its judge."""

    def start(program: str) -> Judge:
        judge = connect(lambda end: run_program(end, marshal.dumps((program, [])), "/"))
        judge.greet()
        judge.ask("run")
        return judge

    return start


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1) as sandbox:
        yield sandbox


def frame(text: bytes) -> bytes:
    return struct.pack(">Q", len(text)) + text


SEVEN = frame(b'["return", 7, []]')
FAULTY = {
    "right": (SEVEN, {"passed": True}),
    "two answers": (SEVEN + SEVEN, {"fault": "answered before it was asked"}),
    "no answer": (frame(b"7"), {"fault": "sent what is no message"}),
    "leaves": (b"", {"fault": "left"}),
}


@pytest.mark.parametrize(("answer", "verdict"), FAULTY.values(), ids=FAULTY)
def test_a_check_that_catches_everything_does_not_pass_a_program_with_a_fault(answer, verdict, monkeypatch, tmp_path):
    for name in ("program", "__main__"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)
    control, server = socket.socketpair()
    pid = os.fork()
    if pid == 0:  # the fork server and the program
        try:
            end = socket.socket(fileno=socket.recv_fds(server, 100, 1)[1][0])
            control.close()
            end.sendall(os.fsencode(tmp_path))
            for reply in (SEVEN, answer):  # to "run" and to the check's question
                end.recv(2**16)
                end.sendall(reply)
            while answer and end.recv(2**16):
                end.sendall(SEVEN)
        finally:
            os._exit(0)
    check = "for i in range(3):\n    try:\n        assert f == 7\n    except BaseException:\n        pass"
    with control, server:
        _serve_check(control, struct.pack(HEADER, False, 0, 0), marshal.dumps((check, "f", 0, {})))
        os.waitpid(pid, 0)
        assert json.loads(server.recv(2**16).removeprefix(b".")) == verdict | {"last": False}


def test_a_module_that_the_check_uses_is_the_judges_own_and_any_other_name_the_programs(start):
    judge = start("class math:\n    fabs = staticmethod(lambda x: 0)\n    own = 3\n")
    names = {"__builtins__": judge.builtins_of_check("")}
    exec("assert math.fabs(2) == 0 and math.own == 3", names)
    judge.modules = {"math": "math", "re": "re"}
    exec("assert math.fabs(2) == 2", names)
    assert judge.look_up("math") is math
    with pytest.raises(NameError):
        exec("re", names)  # it is not the program's
    check = "def check(f):\n    assert math.fabs(f(2) - 4) < 1\ncheck(double)"
    with Sandbox(1) as sandbox:
        wrong = sandbox.run("class math:\n    fabs = staticmethod(lambda x: 0)\ndef double(n): return 7", check)
        assert wrong.error == "AssertionError" and not wrong.shared
        assert sandbox.run("import math as m\nmath = m\ndef double(n): return 2 * n", check).passed


def test_the_check_alone_can_cause_sharing(start):
    judge = start("def call(f): return f()\ndef call_quietly(f):\n    try: f()\n    except Exception as e: return str(e)")

    class Own:
        pass

    with pytest.raises(TypeError, match="of type Own of the check cannot be sent"):
        judge.look_up("call")(lambda: Own())
    reason = judge.look_up("call_quietly")(lambda: judge.look_up("call")(Own()))
    assert "cannot be sent" in reason and judge.needs_sharing is None
    with pytest.raises(NeedsSharing):
        judge.look_up("call")(Own())
    assert "of type Own of the check" in judge.needs_sharing


@pytest.mark.parametrize(
    "data", [["list", [1]], ["bytearray", "AAAA"], ["array", "<i8", [1], "AwAAAAAAAAA="], ["dict", [], []]], ids=str
)
def test_what_derives_from_a_number_or_text_is_made_of_nothing_else(start, data):
    """Of a list, numpy's class of arrays would make one that shows the judge's memory: its freed arrays."""
    if data[0] == "array":
        pytest.importorskip("numpy")
    judge = start("")
    assert judge.stand_in(0, "Level", "object", 3) + 1 == 4
    with pytest.raises(ValueError):
        judge.stand_in(1, "Level", "object", data)


LEAVES = """
import builtins, os, random, signal, sys, threading
print = sum
setattr(builtins, "abs", lambda x: 0)
vars(builtins)["len"] = vars(builtins)["new"] = lambda x: 0
getattr(sys, "setrecursion" + "limit")(100)
signal.setitimer(signal.ITIMER_REAL, 0.3)
os.chdir(folder)
sys.stderr.close()
random.random()
f()
"""
FINDS = """
import os, random, sys, time
assert len("ab") == 2 == abs(-2) and print is not sum and sys.getrecursionlimit() == 1000
try:
    new
    assert 0
except NameError:
    pass
sys.stderr.write("x")
time.sleep(0.5)
assert os.getcwd() == folder
assert 0, random.random()
"""
PROGRAM = "import os\nfolder = os.getcwd()\ndef f(): pass\n"


def test_a_check_finds_nothing_of_the_one_before(sandbox):
    worker = sandbox._workers[0].process.pid
    found = []
    for _ in range(2):
        found.append(sandbox.run(PROGRAM, FINDS).detail)
        assert sandbox.run(PROGRAM, LEAVES).passed
    assert sandbox._workers[0].process.pid == worker
    assert found[0] == found[1] and float(found[0].rpartition(" ")[2])


@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()", "passed"),
        ("x = bytearray(2**45)", "out of memory"),
        ("for i in range(10**12): pass", "timed out"),
        ("import os\nos._exit(0)", "killed"),
    ],
    ids=["a thread that goes on", "out of memory", "for ever", "it leaves"],
)
def test_after_a_check_that_spoils_its_judge_there_is_another(sandbox, check, outcome):
    worker = sandbox._workers[0].process.pid
    assert sandbox.run("x = 1", check).outcome == outcome
    assert sandbox._workers[0].process.pid != worker and sandbox.run("x = 1", "assert x == 1").passed
