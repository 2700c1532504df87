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

import pytest

from sandbox.judge import Judge, NeedsSharing, _serve_check
from sandbox.pool import Sandbox, _request
from sandbox.runner import run_program
from sandbox.verdict import HEADER, Limits

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
    with Sandbox(1, Limits(timeout_s=1.0)) as sandbox:
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
            control.close()
            end = socket.socket(fileno=socket.recv_fds(server, 100, 1)[1][0])
            end.sendall(os.fsencode(tmp_path))
            for reply in (SEVEN, answer):  # to "run" and to the check's question
                end.recv(2**16)
                end.sendall(reply)
            while answer and end.recv(2**16):
                end.sendall(SEVEN)
        finally:
            os._exit(0)
    check = "".join(f"try:\n    assert {name} == 7\nexcept BaseException:\n    pass\n" for name in "fgh")
    request = _request("", check, "f", shared=False)
    size = struct.calcsize(HEADER)
    with control, server:
        _serve_check(control, -1, request[:size], request[size:])
        told = json.loads(server.recv(2**16).removeprefix(b"."))
    del told["last"]  # pytest may have threads
    assert told == verdict
    os.waitpid(pid, 0)


def test_a_module_that_the_check_uses_is_the_judges_own_and_any_other_name_the_programs(start):
    judge = start("class math:\n    fabs = staticmethod(lambda x: 0)\n    own = 3\n")
    names = {"__builtins__": judge.builtins_of_check("")}
    exec("assert math.fabs(2) == 0 and math.own == 3", names)
    judge.modules = {"math": ["fabs"], "re": ["match"]}
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
    judge = start("def call(f): return f()\ndef quietly(f):\n    try: f()\n    except Exception as e: return str(e)")

    class Own:
        pass

    with pytest.raises(TypeError, match="of type Own of the check cannot be sent"):
        judge.look_up("call")(lambda: Own())
    reason = judge.look_up("quietly")(lambda: judge.look_up("call")(Own()))
    assert "cannot be sent" in reason and judge.needs_sharing is None
    with pytest.raises(NeedsSharing):
        judge.look_up("call")(Own())
    assert "of type Own of the check" in judge.needs_sharing


# It knows nothing of the answer. It says that its object is derived from an array, which holds the number 3: then the
# class of arrays would be called with that, and would make one of three numbers, out of memory that was used before.
UNWRITTEN = """
import json, os, struct, time
def f(x):
    array = ["array", "<i8", [1], "AwAAAAAAAAA="]
    answer = json.dumps(["return", ["own", 900, "floats", "object", array], []]).encode()
    os.write(3, struct.pack(">Q", len(answer)) + answer)
    time.sleep(9)
"""


def test_no_object_of_the_program_shows_memory_of_the_judge():
    pytest.importorskip("numpy")
    check = "import numpy as np\ndef right(x): return np.array([x * 1.5, x + 4.0, x ** 0.5])\n"
    check += "n, = right(2.0).shape\ngot = f(2.0)\nassert np.array_equal(got, right(2.0))"
    with Sandbox(1, preload=["numpy"]) as sandbox:
        assert not sandbox.run(UNWRITTEN, check, "f").passed


def test_a_class_with_a_name_of_ten_megabytes_is_judged_as_any_other(sandbox):
    program = "class C:\n    def three(self): return 3\nC.__name__ = 'C' * 10**7\n"
    assert sandbox.run(program, "assert C().three() == 3").passed
    result = sandbox.run(program, "C() + 3")  # whose message names the type
    assert (result.error, len(result.message) < 1000) == ("TypeError", True)


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
        ("import time\nfrom threading import Thread as T\nT(target=time.sleep, args=(9,)).start()", "passed"),
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
