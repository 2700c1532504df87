"""Where check and program share an interpreter: the secret's way, what is put back, and how results tell of it."""

import builtins
import copy
import os
import random
import re
import socket
import sys
from collections.abc import Iterator

import pytest

from sandbox.pool import Sandbox
from sandbox.shared import SECRET_BYTES, _hooks, _put_back
from sandbox.verdict import SHARED

SECRET = b"s" * SECRET_BYTES


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1) as sandbox:
        yield sandbox


def test_the_secret_is_sent_from_one_frame_of_one_process_to_one_socket():
    ours, theirs = socket.socketpair()
    other, others = socket.socketpair()
    for end in (theirs, others):
        end.setblocking(False)
    finish, _ = _hooks("token", SECRET, ours.fileno(), sys._getframe())

    def sent() -> list[bytes]:
        said = []
        for end in (theirs, others):
            try:
                said.append(end.recv(100))
            except BlockingIOError:
                said.append(b"")
        return said

    finish("other", ())
    (lambda: finish("token", ()))()  # another frame
    [*map(lambda event: finish(event, ()), ["token"])]
    pid = os.fork()
    if pid == 0:
        finish("token", ())
        os._exit(0)
    os.waitpid(pid, 0)
    kept = os.dup(ours.fileno())
    os.dup2(other.fileno(), ours.fileno())
    finish("token", ())
    os.dup2(kept, ours.fileno())
    os.close(kept)
    assert sent() == [b"", b""]
    finish("token", ())
    assert sent() == [SECRET, b""]
    for end in (ours, theirs, other, others):
        end.close()


def test_modules_classes_and_tables_are_put_back_by_nothing_that_a_program_could_change():
    names, at_first = vars(builtins), dict(vars(builtins))
    pattern = re.compile("ab+$")
    put_back = _put_back([re, copy, random])
    try:
        re.match, re.added = None, 1
        re._cache[str, "ab+$", 0] = re.compile("")
        copy._deepcopy_dispatch[list] = lambda x, memo: x
        random.Random.randrange = random.Random.added = lambda *a: 0
        sys.modules["copy"] = random
        names.clear()
        names["added"] = 1
        put_back()
        found = names.copy()
    finally:
        names.clear()
        names.update(at_first)
    assert found == at_first
    items = [[1]]
    assert re.match("ab+$", "zz") is None and re.compile("ab+$") == pattern and not hasattr(re, "added")
    assert copy.deepcopy(items)[0] is not items[0] and sys.modules["copy"] is copy
    assert {random.randrange(100) for _ in range(50)} != {0} and not hasattr(random.Random, "added")


REFUSED = [
    "import ctypes", "import _ctypes", "(lambda: 0).__code__.replace(co_code=b'')", "f.__code__ = g.__code__",
    "import sys; seen = []; sys.addaudithook(lambda *a: seen.append(a)); open('x', 'w').close(); seen[0]",
    "import sys; sys.settrace(print)", "import sys; sys.setprofile(print)",
    "import sys; sys._current_frames()", "import gc; gc.get_objects()", "import gc; gc.get_referrers(f)",
    "import importlib; importlib.reload(__import__('ctypes'))", "import sandbox.shared", "import forkserver",
]  # fmt: skip


def test_ways_to_a_value_without_a_name_are_refused(sandbox):
    program = "def f(): pass\ndef g(): pass\nclass Base: pass\ndone = []\n"
    program += "".join(f"try:\n    {line}\n    done.append({line!r})\nexcept Exception: pass\n" for line in REFUSED)
    result = sandbox.run(program, "class Derived(Base): pass\nassert done == [], done")
    assert (result.shared, result.detail) == (True, "")


DERIVES = "class Derived(Base): pass\n"  # seen when the check runs
PATCHES = "import math\nmath.floor = lambda x: 7\n"  # seen before
PROGRAM = "class Base:\n    x = 1\ndef floor(x):\n    return math.floor(x)\n"


@pytest.mark.parametrize("why", [DERIVES, PATCHES], ids=["derives", "patches"])
def test_a_result_says_that_it_was_shared_and_strict_refuses_it(sandbox, why):
    right, wrong = sandbox.run(PROGRAM, why + "assert Base.x == 1"), sandbox.run(PROGRAM, why + "assert Base.x == 2")
    assert [right.passed, right.shared, wrong.outcome, wrong.shared] == [True, True, "failed", True]
    with Sandbox(1, strict=True) as strict:
        refused = strict.run(PROGRAM, why + "assert Base.x == 1")
        assert (refused.outcome, refused.error, refused.shared) == ("failed", SHARED, True)
        assert "the check " in refused.message
        apart = strict.run(PROGRAM, "import math\nassert floor(2.5) == 2")
        assert apart.passed and not apart.shared


SAME = {
    "passed": "assert call(lambda: 4) == 4",
    "wrong": "assert call(lambda: 4) == 5, 'no'",
    "in the program": "call(None)",
    "a name": "nosuch",
    "an entry point": "assert sum(1, 2) == 3",
    "an import": "from math import \\\n    floor\nfrom math import (ceil, # (up)\n  pi)\nassert call(floor, 2.5) == 2",
    "a text": "text = '''\nfrom the top\nimport nothing\n'''\nassert text",
    "leaves": "leave()",
    "too much memory": "call(bytearray, 2**45)",
}


@pytest.mark.parametrize("check", SAME.values(), ids=SAME)
def test_the_verdict_is_that_of_two_processes(sandbox, check):
    program = "class Base: pass\ndef call(f, *args):\n    return f(*args)\ndef sum(a, b): return a + b\n"
    program += "def leave():\n    import os\n    os._exit(3)\n"
    apart, shared = (sandbox.run(program, first + check, "sum") for first in ("class Derived: pass\n", DERIVES))
    assert (apart.outcome, apart.detail) == (shared.outcome, shared.detail)
    assert shared.shared and not apart.shared
