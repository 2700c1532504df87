"""Programs that cheat, do harm or are merely odd get the right verdicts, and leave nothing behind.

hostile_programs.txt holds them. Each is bounded: at most 3,000 forks, 20 GB of memory, no signal to every process. Its
heading lists the right verdicts: an outcome, or an outcome and the exception's type. After `alone:` it lists those that
are right without namespaces, where a program may start no other process.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from program_files import sections

from sandbox.pool import Sandbox
from sandbox.verdict import Limits

CHECK = "def check(candidate):\n    for i in range(5):\n        assert abs(candidate(i) - 2 * i) < 1\ncheck(double)"
ON_LINUX = sys.platform.startswith("linux")


class Hostile(NamedTuple):
    name: str
    program: str
    verdicts: list[str]  # in namespaces
    alone: list[str]  # without


def hostile_programs() -> list[Hostile]:
    programs = []
    for heading, (program,) in sections("hostile_programs.txt"):
        program = program.replace("NUL", "\0").replace("SURROGATE", "\ud800")
        name, _, verdicts = heading.partition(" -> ")
        inside, _, alone = verdicts.partition(" | alone: ")
        programs.append(Hostile(name, program, inside.split(", "), (alone or inside).split(", ")))
    return programs


def children() -> set[str]:
    """The ids of all processes below this one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[path.parent.name] = path.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
    found = {str(os.getpid())}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {str(os.getpid())}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.mark.skipif(not ON_LINUX, reason="the confinement is Linux's")
@pytest.mark.parametrize("without", [[], ["seccomp"], ["namespaces"]], ids=["all", "no seccomp", "no namespaces"])
def test_hostile_programs_get_their_verdicts_and_change_nothing(without, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("sings")
    for path in (canary, canary / "file"):
        path.chmod(0o777)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    before, processes = (canary / "file").stat(), children()
    programs = hostile_programs()
    texts = [p.program.replace("CANARY", str(canary)).replace("PARENT", str(os.getpid())) for p in programs]
    monkeypatch.setattr("tempfile.tempdir", None)
    with Sandbox(2, Limits(timeout_s=0.7, memory_bytes=2**30), without=without) as sandbox:
        if len([m for m in sandbox.missing if not m.startswith("another user")]) > len(without):
            pytest.skip(f"this machine lacks {sandbox.missing}")
        results = dict(sandbox.run_many((text, CHECK, "double") for text in texts))
        assert sandbox.run("x = 1", "assert x").passed, "it still works"
    wrong = {}
    for index, program in enumerate(programs):
        result = results[index]
        expected = program.alone if "namespaces" in without else program.verdicts
        verdict = f"{result.outcome} {result.error}"
        # Without seccomp, a call that it would refuse may work. Then the program is judged by what it returns.
        refused = "seccomp" in without and expected == ["failed PermissionError"] and result.outcome == "failed"
        if result.outcome not in expected and verdict not in expected and not refused:
            wrong[program.name] = (verdict, result.detail, expected)
        assert result.passed <= (not program.name.startswith("cheat")), f"{program.name} passed"
        assert not result.shared
    assert wrong == {}
    assert (canary / "file").stat() == before and os.listdir(canary) == ["file"]
    assert children() == processes and os.listdir(temporary) == []


def test_all_hostile_programs_are_there():
    names = [program.name for program in hostile_programs()]
    kinds = [sum(name.startswith(kind) for name in names) for kind in ("cheat: ", "harmful: ", "honest: ")]
    assert len(set(names)) == len(names) == sum(kinds) and min(kinds) > 15


def test_a_result_says_what_where_and_what_was_printed(sandbox):
    program = "import sys\ndef f(x):\n    print('prints', file=sys.stderr)\n    return [][x]\n"
    result = sandbox.run(program, "assert f(0) == 1")
    assert (result.outcome, result.error, result.line) == ("failed", "IndexError", 4)
    assert result.message == "list index out of range" and result.output == "prints\n"
    assert sandbox.run("x = 1\n", "\nassert x == 1\nassert x == 2").line == 4
    assert sandbox.run("x = 1", "assert x == 2").line == 2
    assert sandbox.run("x = 1\nx = = 2").detail.startswith("line 2: SyntaxError: invalid syntax")
    result = sandbox.run("print('x' * 100_000)\nprint('y')")
    assert result.passed and result.output == "x" * 2**16


def test_a_check_sees_the_programs_names_as_they_change_and_lends_its_imports(sandbox):
    program = "count = 0\ndef hit():\n    global count\n    count += 1\n    return math.pi\n"
    assert sandbox.run(program, "import math\nfor i in range(3):\n    hit()\nassert count == 3").passed
    assert sandbox.run(program, "hit()").error == "NameError"
    own_sum = "def sum(a, b):\n    return a + b"
    assert sandbox.run(own_sum, "assert sum(1, 2) == 3", "sum").passed
    assert sandbox.run(own_sum, "assert sum(1, 2) == 3").error == "TypeError"  # the builtin, unless it is asked for


def test_sleepers_wait_side_by_side_and_a_starved_program_gets_its_share():
    with Sandbox(2, Limits(timeout_s=0.6)) as sandbox:
        t0 = time.monotonic()
        sleep = ("import time; time.sleep(9)", "", "")
        results = dict(sandbox.run_many([sleep, sleep, ("x = 1", "", "")]))
        assert time.monotonic() - t0 < 4.0 / len(sandbox._workers) and results[2].passed  # on a loaded machine twice
        assert [results[i].outcome for i in range(2)] == ["timed out"] * 2
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
        try:
            work = "import time\nwhile time.process_time() < 0.5: pass\n"
            results = list(sandbox.run_many([(work, "", "")] * 2))
            endless = sandbox.run("while True: pass")
        finally:
            for process in busy:
                process.kill()
                process.wait()
    assert all(result.passed for _, result in results) and max(result.seconds for _, result in results) > 0.6
    assert endless.outcome == "timed out" and endless.cpu_seconds > 0.5


def test_a_worker_that_dies_is_replaced_and_its_program_tried_again(sandbox):
    sandbox._workers[0].process.kill()
    time.sleep(0.2)
    assert [r.outcome for _, r in sandbox.run_many([("x = 1", "", "")] * 4)] == ["passed"] * 4
    threading.Timer(0.3, sandbox._workers[0].process.kill).start()
    assert sandbox.run("import time; time.sleep(0.6)").passed


@pytest.mark.skipif(not ON_LINUX, reason="looks into /proc")
@pytest.mark.parametrize("without", [[], ["namespaces"]], ids=["namespaces", "no namespaces"])
def test_a_program_killed_while_it_is_read_does_not_disturb_the_next(without):
    long = "x = 1\n" * 400_000 + "def f(x):\n    return x\n"  # more than a pipe holds
    with Sandbox(1, without=without) as sandbox:
        before = children()
        killed = []

        def kill() -> None:
            while not killed:
                for pid in children() - before:
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(pid)

        thread = threading.Thread(target=kill)
        thread.start()
        programs = [(long, "assert f(1) == 1", "f")] + [("def f(x): return x", "assert f(1) == 1", "f")] * 2
        results = dict(sandbox.run_many(programs))
        thread.join()
    assert results[0].error == "SIGKILL" and results[1].passed and results[2].passed


def test_another_thread_may_close_it_while_it_runs():
    before = children()
    for _ in range(3):
        sandbox = Sandbox(2, Limits(timeout_s=5.0))
        timer = threading.Timer(0.2, sandbox.close)
        timer.start()
        with pytest.raises(RuntimeError, match="closed"):
            list(sandbox.run_many([("import time; time.sleep(0.05)", "", "")] * 200))
        timer.join()
    assert children() == before


def test_a_caller_may_leave_early_but_not_run_two_at_once(sandbox):
    runs = sandbox.run_many([("x = 1", "", ""), ("import time; time.sleep(1)", "", "")])
    next(runs)
    with pytest.raises(RuntimeError, match="running other programs"):
        sandbox.run("x = 1")
    runs.close()
    assert sandbox.run("y = 2", "assert y == 2").passed
    other = Sandbox(1)
    runs = other.run_many([("x = 1", "", "")] * 3)
    next(runs)
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(runs)
    with pytest.raises(RuntimeError, match="closed"):
        other.run("x = 1")


def test_modules_that_a_check_uses_are_as_they_were(sandbox):
    program = "import sys, textwrap\nsys.modules['hashlib'] = sys\ntextwrap.dedent = str"
    check = "import hashlib, textwrap\nassert hashlib.md5(b'').digest_size == 16 and textwrap.dedent(' x') == 'x'"
    assert sandbox.run(program, check).passed
    check = "import math\nassert math.fabs(double(2) - 4) < 1"
    assert not sandbox.run("import math\nmath.fabs = lambda x: 0\ndef double(n):\n    return -7", check).passed
    assert sandbox.run("x = 1\n" * 9, "\nimport nosuch").line == 11


@pytest.mark.skipif(not ON_LINUX, reason="looks into /proc")
@pytest.mark.parametrize("without", [[], ["namespaces"]], ids=["namespaces", "no namespaces"])
def test_what_a_killed_parent_leaves_goes_by_itself(without, tmp_path):
    code = (
        f"from sandbox.pool import Sandbox\nsandbox = Sandbox(1, without={without})\n"
        "print(sandbox._workers[0].process.pid, flush=True)\n"
        'sandbox.run(\'import time; open("x", "w").write("y"); time.sleep(30)\')'
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    worker = int(parent.stdout.readline())
    time.sleep(0.3)
    assert len(os.listdir(tmp_path)) == len(without)  # in namespaces it is in memory
    parent.kill()
    parent.wait()
    parent.stdout.close()
    stat = Path(f"/proc/{worker}/stat")
    t0 = time.monotonic()
    while stat.exists() and ") Z " not in stat.read_text():  # a zombie has ended, whoever reaps it
        assert time.monotonic() - t0 < 2.0, "the worker runs on"  # well before the program's own timeout
        time.sleep(0.1)
    assert os.listdir(tmp_path) == []
