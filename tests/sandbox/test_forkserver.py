"""What a program and a check find, whatever the process is like that started the sandbox."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from sandbox.pool import Sandbox
from sandbox.verdict import Limits

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the confinement is Linux's")

FRESH = """
import os, resource, signal, sys
names = [s for s in signal.Signals if signal.getsignal(s) is not signal.SIG_DFL]
print(sorted(s.name for s in names), *signal.pthread_sigmask(signal.SIG_BLOCK, ()))
opened = []
for fd in range(256):
    try:
        os.fstat(fd)
        opened.append(fd)
    except OSError:
        pass
print(opened, repr(sys.stdin.read()), oct(os.umask(0)), os.listdir("."))
print([resource.getrlimit(getattr(resource, "RLIMIT_" + name))[0] for name in ("AS", "FSIZE", "NOFILE", "CORE", "CPU")])
print(sorted(os.environ), {os.environ["HOME"], os.environ["TMPDIR"]} == {os.getcwd()})
class Base: pass
"""
VARIABLES = ["HOME", "LANG", "LOGNAME", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH"]
VARIABLES += ["PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "TMPDIR", "USER"]
FOUND = f"""['SIGINT', 'SIGPIPE', 'SIGXFSZ']
[0, 1, 2, 3] '' 0o22 []
[{2**31}, {2**20}, 200, 0, 3]
{VARIABLES} True
"""
APART, SHARED = "Base()", "class Derived(Base): pass"


@pytest.fixture
def odd_parent(monkeypatch) -> Iterator[None]:
    """This process blocks and ignores signals, has an odd umask, and variables and descriptors that are inherited."""
    signals = {signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1}
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in signals}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*signals, signal.SIGCHLD})
    umask, fd = os.umask(0o077), os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(fd, True)
    monkeypatch.setenv("SECRET_TOKEN", "x")
    yield
    os.close(fd)
    os.umask(umask)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@LINUX
@pytest.mark.parametrize("without", [[], ["namespaces"]], ids=["namespaces", "no namespaces"])
def test_a_program_finds_what_a_fresh_process_has_whatever_its_parent_has(odd_parent, without):
    limits = Limits(timeout_s=1.0, memory_bytes=2**31, file_bytes=2**20, open_files=200)
    with Sandbox(1, limits, without=without) as sandbox:
        for check in (APART, SHARED):
            result = sandbox.run(FRESH, check)
            assert result.passed and result.shared == (check == SHARED), result.detail
            assert result.output == FOUND


ALARM = "import time\nfrom signal import *\nsignal(SIGALRM, lambda *_: 1 / 0)\nsetitimer(ITIMER_REAL, 0.1)\n"


@LINUX
def test_a_check_gets_its_alarm_and_an_exit_is_seen_at_once_whatever_the_parent_blocks(odd_parent):
    with Sandbox(1, Limits(timeout_s=2.0)) as sandbox:
        assert sandbox.run("x = 1", ALARM + "time.sleep(0.5)").error == "ZeroDivisionError"
        leaves = "import os\nclass Base:\n    def leave(self): os._exit(7)"
        for check in ("Base().leave()", "class Derived(Base): pass\nDerived().leave()"):
            result = sandbox.run(leaves, check)
            assert result.error == "exit" and result.seconds < 0.5


@LINUX
def test_a_sandbox_starts_with_all_its_walls_where_children_are_reaped_by_the_system():
    with Sandbox(1) as sandbox:
        missing = sandbox.missing
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Sandbox(1) as sandbox:
            assert sandbox.missing == missing
            assert sandbox.run("import subprocess\nsubprocess.run(['true'], check=True)").passed
    finally:
        signal.signal(signal.SIGCHLD, before)
