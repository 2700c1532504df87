"""Each wall holds where the kernel has it, also as an older kernel has it: programs make the calls that would climb it,
at a process and a file of the same user, which must survive. `without` emulates a kernel."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = 65534
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are Linux's")

# Runs programs, each a Python text, in one Confinement, and after each the text of the judge. All find the names that
# `names` has: OTHERS are the ids that their judge may have.
DRIVER = """
import ctypes, errno, json, os, platform, socket, sys
settings = json.load(sys.stdin)
sys.path[0] = settings["root"]
from sandbox.confine import Confinement
from sandbox.namespaces import DIRECTORY, wait_for_child
from sandbox.syscalls import TABLES
from sandbox.verdict import Limits
sys.path[:1] = settings["folders"]
column = ["x86_64", "aarch64"].index(platform.machine())
numbers = {name: table[name][column] for table in TABLES for name in table}
numbers |= {name: pair[column] for name, pair in settings["numbers"].items()}
libc = ctypes.CDLL(None, use_errno=True)

def raw(name, *arguments):
    "Make a system call. Returns '' or the name of its error."
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if libc.syscall(ctypes.c_long(numbers[name]), *passed) >= 0:
        return ""
    return errno.errorcode[ctypes.get_errno()]

def say(value):
    os.write(1, json.dumps(value).encode() + b"\\n")

def be_judge(confinement):
    try:
        control.close()
        confinement.layers = json.loads(judge_control.recv(2**12))
        confinement.enter(DIRECTORY if confinement.namespaces else confinement.directory, judge=True)
        judge_control.sendall(b".")
        while judge_control.recv(1):
            exec(settings["judge"], names)
            judge_control.sendall(b".")
    except BaseException as error:
        say(f"{type(error).__name__}: {error}")
    judge_control.close()
    wait_for_child()

names = {"raw": raw, "say": say, "ctypes": ctypes, "os": os, "__name__": "__main__"} | settings["names"]
control, judge_control = socket.socketpair()
confinement = Confinement(settings["directory"], Limits(), settings["without"], be_judge)
judge_control.close()
names |= {"SERVER": os.getpid(), "OTHERS": range(2, 200) if confinement.namespaces else [os.getppid()]}
say({"missing": confinement.missing, **confinement.layers})
control.sendall(json.dumps(confinement.layers).encode())
control.recv(1)
for text in settings["programs"]:
    directory = confinement.begin()
    program = os.fork()
    if program == 0:
        try:
            names["OTHERS"] = {*names["OTHERS"]} - {os.getpid()}
            os.setsid()
            os.chdir(directory)
            confinement.enter(directory)
            exec(text, names)
        except BaseException as error:
            say(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    os.waitpid(program, 0)
    control.sendall(b".")
    assert control.recv(1), "the judge has gone"
    confinement.end(directory, program)
say({"changed": confinement.changed_limits(), "left": os.path.exists(directory) and not confinement.namespaces})
confinement.leave()
"""
# Calls that syscalls.py does not list.
REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "kcmp": (312, 272),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "socket": (41, 198), "connect": (42, 203), "bind": (49, 200),
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "add_key": (248, 217), "keyctl": (250, 219), "bpf": (321, 280), "inotify_init1": (294, 26),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51), "mknodat": (259, 33),
    "open_by_handle_at": (304, 265), "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
ALONE = ["namespaces"]
OLD = [["namespaces", "Landlock 3"], ["namespaces", "Landlock 6"]]
EVERY = [[], ["seccomp"], ALONE, [*ALONE, "seccomp"], [*ALONE, "Landlock", "seccomp"]]


class Seen(NamedTuple):
    said: list[Any]  # by the programs and the judge
    missing: list[str]
    landlock: int  # its version
    namespaces: bool
    changed: bool  # whether limits of the fork server or the judge were changed


def run(
    *programs: str,
    without: list[str],
    judge: str = "",
    user: int | None = None,
    python: str = sys.executable,
    folders: tuple[Path, ...] = (),
    may_lack: str = "",  # a layer that this test does without
    **names: Any,
) -> Seen:
    """Run programs, one after the other, with one judge beside them. Skips the test where a layer is missing."""
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o755)
        if user is not None:
            os.chown(outer, user, user)
        settings = {"root": str(ROOT), "directory": f"{outer}/new", "without": without, "programs": programs}
        settings |= {"judge": judge, "names": names, "numbers": REFUSED, "folders": [str(path) for path in folders]}
        options = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        command = [python, "-c", DRIVER]
        result = subprocess.run(
            command, input=json.dumps(settings), capture_output=True, text=True, cwd="/", timeout=60, **options
        )
        assert result.returncode == 0, result.stderr
        first, *said, last = map(json.loads, result.stdout.splitlines())
        assert os.listdir(outer) == [] and not last["left"], "it leaves its folder"
    for text in first["missing"]:
        assert ": " in text
        if not text.startswith((*[name for name in without if " " not in name], "another user", may_lack or "another")):
            pytest.skip(f"this machine lacks {text}")
    return Seen(said, first["missing"], first["landlock"], first["namespaces"], last["changed"])


def python_for_others() -> str:
    """A Python that every user can start, and that reads this project. Skips the test if there is none."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; import sandbox.confine; assert sys.version_info >= (3, 10)"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(OSError):
            options = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "capture_output": True, "cwd": "/"}
            if subprocess.run([python, "-c", code], **options).returncode == 0:
                return python
    pytest.skip("other users cannot run Python")


@pytest.fixture
def victim() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    assert process.poll() is None, "a program killed a process of its user"
    assert b"\nMax open files            77 " not in Path(f"/proc/{process.pid}/limits").read_bytes()
    process.kill()
    process.wait()


@pytest.fixture
def precious(tmp_path) -> Iterator[Path]:
    """A file that a program may read, in a folder of its own, and that everybody could change."""
    path = tmp_path / "folder" / "precious"
    path.parent.mkdir()
    path.write_text("sings")
    path.chmod(0o666)
    before = path.stat()
    yield path
    assert path.read_text() == "sings" and os.listdir(path.parent) == ["precious"] and os.listxattr(path) == []
    after = path.stat()
    assert [getattr(after, name) for name in dir(after) if name.startswith("st_") and "atime" not in name] == [
        getattr(before, name) for name in dir(before) if name.startswith("st_") and "atime" not in name
    ]


LOOK = """
outside = [name for name in ("home", "proc", "sys", "var") if os.path.exists("/" + name)]
say({"uid": os.getuid(), "parent": os.getppid(), "outside": outside, "inside": os.listdir(".")})
"""


def test_in_namespaces_a_program_is_alone_with_python():
    seen = run(LOOK, without=[]).said[0]
    assert seen["parent"] == 1 and seen["uid"] in (0, 1000)  # 0 stands for the user who started it, unless that is root
    assert seen["outside"] == seen["inside"] == []


def test_layers_left_out_are_named_with_what_that_means():
    missing = run(LOOK, without=["namespaces", "Landlock", "seccomp"]).missing
    assert [text.split(" (")[0] for text in missing][:3] == ["namespaces", "Landlock", "seccomp"]


SIGNAL = """
import socket, struct
got = {"kill": raw("kill", VICTIM, 9), "tgkill": raw("tgkill", VICTIM, VICTIM, 9), "group": raw("kill", -VICTIM, 9)}
got["tkill"], got["queue"] = raw("tkill", VICTIM, 9), raw("rt_sigqueueinfo", VICTIM, 9, bytes(128))
got["pidfd"] = raw("pidfd_open", VICTIM, 0)
got["pidfd_send"] = raw("pidfd_send_signal", 0, 9, None, 0)
ours, theirs = socket.socketpair()
fd, pid = ours.fileno(), struct.pack("i", VICTIM)
got["F_SETOWN"] = raw("fcntl", fd, 8, VICTIM)
got["F_SETOWN_EX"] = raw("fcntl", fd, 15, struct.pack("ii", 1, VICTIM))
got["F_SETSIG"] = raw("fcntl", fd, 10, 9)
got["FIOSETOWN"], got["SIOCSPGRP"] = raw("ioctl", fd, 0x8901, pid), raw("ioctl", fd, 0x8902, pid)
raw("fcntl", fd, 4, 0o2000 | 0o20000)  # O_ASYNC: the owner gets the signal when there is something to read
theirs.send(b"x")
got["PDEATHSIG"] = raw("prctl", 1, 0)
got["prlimit"] = raw("prlimit64", VICTIM, 7, struct.pack("QQ", 77, 77), None)
got["ptrace"] = raw("ptrace", 16, VICTIM, 0, 0)
got["setpriority"] = raw("setpriority", 0, VICTIM, 19)
got["affinity"] = raw("sched_setaffinity", VICTIM, 8, struct.pack("Q", 1))
say(got)
"""


@pytest.mark.parametrize("without", OLD, ids=str)
def test_without_namespaces_no_call_reaches_another_process(without, victim):
    (got,) = run(SIGNAL, without=without, VICTIM=victim.pid).said
    assert set(got.values()) == {"EPERM"}


TRUNCATE = """
got = {"truncate": raw("truncate", FILE, 0)}
for mode in (0, 3):  # to read, and to do neither
    got[mode] = raw("openat", -100, FILE, mode | 0o1000, 0)
got["write"] = raw("openat", -100, FILE, 1, 0)
say(got)
got = {"openat2": raw("openat2", -100, FILE, (0o1000).to_bytes(8, "little") + bytes(16), 24)}
fd = os.open(FILE, os.O_RDONLY)
got["setxattrat"] = raw("setxattrat", -100, FILE, 0, b"user.x", bytes(16), 16)
got["removexattrat"] = raw("removexattrat", -100, FILE, 0, b"user.x")
got["file_setattr"] = raw("file_setattr", -100, FILE, bytes(24), 24, 0)
say(got)
got = {"FS_IOC_SETFLAGS": raw("ioctl", fd, 0x40086602, (0x80).to_bytes(8, "little"))}
got |= {"removexattr": raw("removexattr", FILE, b"user.x"), "F_SETLEASE": raw("fcntl", fd, 1024, 0)}
say(got)
pretended = [raw("fchmod", fd, 0), raw("fchmodat", -100, FILE, 0), raw("fchownat", -100, FILE, 1, 1, 0)]
pretended += [raw("utimensat", -100, FILE, None, 0), raw("setxattr", FILE, b"user.x", b"y", 1, 0)]
say(pretended)
"""


@pytest.mark.parametrize("without", OLD, ids=str)
def test_without_namespaces_no_call_changes_a_file(without, precious):
    program = f"FILE = {os.fsencode(precious)!r}\n{TRUNCATE}"
    seen = run(program, without=without, folders=(precious.parent,))
    truncated, unknown, refused, pretended = seen.said
    assert set(truncated.values()) <= {"EPERM", "EACCES"} and set(unknown.values()) == {"ENOSYS"}
    assert set(refused.values()) == {"EPERM"} and set(pretended) == {""}


@pytest.mark.parametrize("without", [[], ALONE], ids=str)
def test_what_no_program_needs_is_refused(without):
    names = [name for name in REFUSED if not name.endswith("at") and name not in ("file_setattr", "tkill")]
    program = f"say([name for name in {names} if raw(name, 1, 0, 0, 0, 0) != 'EPERM'])\n"
    program += "say([raw('clone3', bytes(64), 64), raw('socketpair', 1, 2, 0, bytes(8)), raw('prctl', 4, 1)])"
    odd, others = run(program, without=without).said
    assert odd == [] and others == ["ENOSYS", "EPERM", "EPERM"]


REACH = """
import struct
secret = ctypes.create_string_buffer(b"of the judge")
local, remote = (struct.pack("PQ", ctypes.addressof(secret), 8) for _ in range(2))
for pid in [SERVER, *OTHERS]:
    got = [raw("ptrace", 16, pid, 0, 0), raw("ptrace", 0x4206, pid, 0, 0), raw("kcmp", os.getpid(), pid, 0, 0, 0)]
    got += [raw("process_vm_readv", pid, local, 1, remote, 1, 0), raw("process_vm_writev", pid, local, 1, remote, 1, 0)]
    for name in ("mem", "environ", "fd/0", "maps"):
        try:
            open(f"/proc/{pid}/{name}", "rb").close()
            got.append("opened " + name)
        except OSError:
            pass
    say(got)
"""


@pytest.mark.parametrize("without", EVERY, ids=str)
@pytest.mark.parametrize("user", [None, NOBODY])
def test_no_program_reaches_the_memory_of_its_judge_or_of_the_server(without, user):
    python = sys.executable if user is None else python_for_others()
    seen = run(REACH, without=without, user=user, python=python)
    server, *others = map(set, seen.said)
    assert server == {"EPERM"} and others
    assert all(got == {"EPERM"} or (seen.namespaces and got == {"ESRCH"}) for got in others)


HARM = """
import struct
limit = struct.pack("QQ", 77, 77)
for pid in [-1, SERVER, *OTHERS]:
    raw("kill", pid, 9), raw("tgkill", pid, pid, 9), raw("kill", -pid, 9), raw("prlimit64", pid, 7, limit, None)
"""


@pytest.mark.parametrize("without", [[], ["seccomp"]], ids=str)
@pytest.mark.parametrize("user", [None, NOBODY])
def test_in_namespaces_no_program_harms_its_judge(without, user):
    python = sys.executable if user is None else python_for_others()
    judge = "import resource; say(resource.getrlimit(resource.RLIMIT_NOFILE))"
    assert run(HARM, HARM, judge=judge, without=without, user=user, python=python).said == [[256, 256]] * 2


START = """
import threading
thread = threading.Thread(target=say, args=("started",))
thread.start()
thread.join()
say(raw("clone", 17, 0, 0, 0, 0))
"""


@pytest.mark.parametrize("without", [[], ALONE], ids=str)
@pytest.mark.parametrize("user", [None, NOBODY])
def test_the_judge_starts_threads_but_no_processes(without, user):
    python = sys.executable if user is None else python_for_others()
    assert run("", judge=START, without=without, user=user, python=python).said == ["started", "EPERM"]


LIMIT = """
import struct
say([raw("prlimit64", pid, 7, struct.pack("QQ", 77, 77), None) for pid in PIDS])
"""


@pytest.mark.parametrize("pids", ["[SERVER]", "OTHERS"])
@pytest.mark.parametrize("without", EVERY, ids=str)
def test_limits_of_the_worker_are_out_of_reach_or_seen_to_change(without, pids):
    python, program = python_for_others(), LIMIT.replace("PIDS", pids)
    if set((seen := run(program, without=without, python=python)).said[0]) - {"EPERM", "ESRCH"}:
        pytest.fail(f"root's program is another user, who cannot: {seen}")
    seen = run(program, without=without, python=python, user=NOBODY)
    reached = "seccomp" in without and not (seen.namespaces and pids == "OTHERS")  # one user has all processes
    assert set(seen.said[0]) <= ({""} if reached else {"EPERM", "ESRCH"}) and seen.changed is reached


THREADS = """
import resource, threading
stop, started = threading.Event(), 0
try:
    for _ in range(2000):
        threading.Thread(target=stop.wait, daemon=True).start()
        started += 1
except RuntimeError:
    pass
open("x", "w").close()
say({"started": started, "uid": os.getuid(), "groups": os.getgroups()})
os._exit(0)
"""


@pytest.mark.parametrize("user", [None, NOBODY])
def test_without_namespaces_threads_are_limited_but_enough(user):
    python = python_for_others()
    seen = run(THREADS, THREADS, without=ALONE, user=user, python=python)
    assert not [text for text in seen.missing if not text.startswith("namespaces")]
    for got in seen.said:
        assert 100 < got["started"] < (256 if user is None else 257 * os.cpu_count())
        assert got["groups"] == [] and (got["uid"] == NOBODY if user else 60000 < got["uid"] < NOBODY)


def test_where_other_users_cannot_read_python_programs_stay_root_and_it_is_said(tmp_path):
    python = python_for_others()
    closed = tmp_path / "closed" / "site"
    closed.mkdir(parents=True)
    closed.parent.chmod(0o700)
    tmp_path.chmod(0o755)
    seen = run(LOOK, without=ALONE, python=python, folders=(closed,))
    assert seen.said[0]["uid"] == 0 and "closed to other users; chmod go+x /" in seen.missing[1]
    tmp_path.parent.chmod(0o700)


@pytest.mark.parametrize("hidden", ["", "package", "module.py"], ids=["folder", "package", "module"])
def test_a_hidden_folder_of_packages_is_named_with_the_remedy(hidden):
    if os.getuid() != 0:
        pytest.skip("another user's files")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "package").mkdir()
        Path(folder, "module.py").touch()
        path = Path(folder, hidden)
        path.chmod(0o700 if path.is_dir() else 0o600)
        missing = run(LOOK, without=[], folders=(Path(folder),), may_lack="some packages").missing
    if missing and "user" not in missing[0]:
        pytest.skip("programs are root")
    assert len(missing) == 1 and f"{path} is hidden from other users; chmod -R go+rX {path} helps)" in missing[0]


SCRATCH = """
say(os.listdir("."))
for folder in ("/tmp", "/dev/shm"):
    open(folder + "/x", "w").write("mine")
    say(open(folder + "/x").read())
say(raw("openat", -100, FOLDER.encode() + b"/lesson.py", 1))
os.rename(os.path.dirname(FOLDER), "/tmp/away")
os.makedirs(FOLDER)
open(FOLDER + "/lesson.py", "w").write("text = 'forged'")
import sys
say(__import__("lesson").text)
"""
JUDGE = """
import sys
sys.modules.pop("lesson", None)
say([__import__("lesson").text, os.path.exists("/tmp/x")])
"""


def test_in_namespaces_tmp_is_fresh_and_writable_though_python_is_below_it():
    with tempfile.TemporaryDirectory(dir="/tmp") as outer:
        folder = Path(outer, "site")
        folder.mkdir()
        for path in (Path(outer), folder):
            path.chmod(0o777)
        (folder / "lesson.py").write_text("text = 'right'")
        (folder / "lesson.py").chmod(0o666)
        seen = run(SCRATCH, SCRATCH, judge=JUDGE, without=[], folders=(folder,), FOLDER=str(folder))
        judges = ["right", False]  # what it imports, and whether it sees the program's file
        assert seen.said == [[], "mine", "mine", "EROFS", "forged", judges] * 2
        assert os.listdir(folder) == ["lesson.py"]


# Right programs. Those that start processes need namespaces. Those that need a package are left out without it.
RIGHT = r"""
#### numpy computes
import numpy as np
a = np.random.rand(300, 300)
np.linalg.svd(a @ a)
np.save('a.npy', np.eye(9))
assert np.load('a.npy', mmap_mode='r+').sum() == 9
#### pandas files
import pandas as pd
pd.DataFrame({'a': [1, 2], 'b': [3, 4]}).to_csv('f.csv', index=False)
assert pd.read_csv('f.csv').size == 4
#### sympy integrates
import sympy
x = sympy.Symbol('x')
assert sympy.integrate(2 * x, x) == x**2
#### sqlite3 with a journal and with shared memory
import sqlite3
for mode in ('delete', 'wal'):
    c = sqlite3.connect(mode + '.db')
    c.execute('pragma journal_mode=' + mode)
    c.execute('create table t(x)')
    c.commit()
    c.close()
#### asyncio with threads
import asyncio
async def f():
    await asyncio.sleep(0.01)
    return await asyncio.to_thread(int, '7')
assert asyncio.run(f()) == 7
#### threading with 100 threads
import threading
from concurrent.futures import ThreadPoolExecutor
threads = [threading.Thread(target=sum, args=([1],)) for _ in range(100)]
[t.start() for t in threads]
[t.join() for t in threads]
with ThreadPoolExecutor(20) as pool:
    assert list(pool.map(abs, [-1])) == [1]
#### threading with a large stack
import sys, threading
sys.setrecursionlimit(9**6)
threading.stack_size(2**28)
def f(n):
    return n and f(n - 1)
t = threading.Thread(target=f, args=(50_000,))
t.start()
t.join()
#### tempfile and shutil
import os, shutil, tempfile
tempfile.NamedTemporaryFile().write(b'x')
tempfile.TemporaryFile().write(b'x')
tempfile.mkdtemp()
open('a', 'w').write('x')
shutil.copy('a', 'b')
shutil.copy2('a', 'c')
os.mkdir('d')
shutil.copytree('d', 'e')
shutil.rmtree('e')
shutil.move('a', 'f')
shutil.make_archive('z', 'zip', 'd')
#### os with files
import os
open('p', 'w').write('x')
os.chmod('p', 0o600)
os.utime('p')
os.link('p', 'q')
os.symlink('p', 'r')
os.stat('r'), os.statvfs('.'), list(os.scandir('.'))
if TRUNCATE:
    os.truncate('q', 0)
open('q', 'r+').truncate(0)
fd = os.open('p', os.O_RDWR)
os.posix_fallocate(fd, 0, 9), os.pread(fd, 1, 0), os.fsync(fd)
files = [open(f'f{i}', 'w') for i in range(100)]
#### os tells about the system
import os, platform, resource, secrets, uuid
platform.platform(), os.uname(), os.cpu_count(), os.sched_getaffinity(0), os.sysconf('SC_NPROCESSORS_ONLN')
resource.getrusage(0), resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))
uuid.uuid4(), secrets.token_hex(), os.getpgrp(), os.getpriority(0, 0), os.times(), os.isatty(0)
#### os.exec
import os
os.execv('/bin/sh', ['sh', '-c', 'test -d . && echo x > y'])
#### ctypes calls C
import ctypes
ctypes.CDLL(None).getpid()
ctypes.CDLL('libm.so.6')
ctypes.pythonapi.Py_IsInitialized()
ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)()
#### mmap
import mmap
m = mmap.mmap(-1, 4096)
m.resize(8192)
f = open('m', 'w+b')
f.truncate(4096)
n = mmap.mmap(f.fileno(), 0)
n[:3] = b'abc'
n.flush()
#### select, poll and epoll
import os, select
r, w = os.pipe()
os.write(w, b'x')
poll = select.poll()
poll.register(r)
epoll = select.epoll()
epoll.register(r)
assert poll.poll(0) and epoll.poll(0) and select.select([r], [], [], 0)[0]
#### socket pairs
import socket
a, b = socket.socketpair()
a.settimeout(1)
b.sendall(b'x')
assert a.recv(1) == b'x'
a.sendmsg([b'y'])
b.recvmsg(9)
a.getsockopt(1, 7), a.setsockopt(1, 7, 9999), a.shutdown(socket.SHUT_WR)
#### signal
import os, signal, time
hits = []
for number in (signal.SIGUSR1, signal.SIGALRM, signal.SIGABRT):
    signal.signal(number, lambda *_: hits.append(1))
os.kill(os.getpid(), signal.SIGUSR1)
signal.raise_signal(signal.SIGABRT)
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.05)
signal.pthread_sigmask(signal.SIG_BLOCK, [10])
signal.sigpending()
assert len(hits) == 3
#### locale and time
import locale, time, zoneinfo
locale.setlocale(locale.LC_ALL, '')
time.tzset()
time.strftime('%c')
#### fcntl
import fcntl
f = open('l', 'w')
fcntl.flock(f, 2), fcntl.lockf(f, 2), fcntl.fcntl(f, 1), fcntl.fcntl(f, 4, 2048)
#### starts processes: subprocess
import subprocess, sys
assert subprocess.run(['/bin/echo', 'x'], capture_output=True, text=True).stdout == 'x\n'
subprocess.check_output('ls | sort; cat < /dev/null; expr 1 + 2', shell=True)
p = subprocess.Popen(['sleep', '9'])
p.terminate()
p.wait()
subprocess.run([sys.executable, '-c', 'import json, ssl, hashlib'], check=True)
#### starts processes: multiprocessing
import multiprocessing as m
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import shared_memory
m.set_start_method('fork')
value = m.Value('i', 0)
def f(i):
    return i * i
with m.Pool(2) as p:
    assert p.map(f, range(4)) == [0, 1, 4, 9]
queue = m.Queue()
p = m.Process(target=queue.put, args=(1,))
p.start()
assert queue.get() == 1
p.join()
with ProcessPoolExecutor(2) as p:
    assert list(p.map(abs, [-1])) == [1]
block = shared_memory.SharedMemory(create=True, size=99)
block.close()
block.unlink()
p = m.get_context('spawn').Process(target=len, args=('x',))
p.start()
p.join()
assert p.exitcode == 0
#### starts processes: os.fork
import os
pid = os.fork()
if pid == 0:
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
#### starts processes: asyncio
import asyncio
async def f():
    p = await asyncio.create_subprocess_exec('/bin/echo', stdout=-1)
    await p.communicate()
    assert p.returncode == 0
asyncio.run(f())
"""
WRAP = """
import importlib.util, sys, traceback, types
name, _, text = {section!r}.partition("\\n")
package = name.split()[0]
sys.modules["__main__"] = module = types.ModuleType("__main__")
module.TRUNCATE = TRUNCATE
if package not in ("numpy", "pandas", "sympy") or importlib.util.find_spec(package):
    try:
        exec(text, module.__dict__)
    except BaseException:
        say(name + ": " + traceback.format_exc())
"""


@pytest.mark.parametrize("user", [None, NOBODY], ids=["this user", "ordinary user"])
@pytest.mark.parametrize("without", [[], ALONE, *OLD[:1]], ids=str)
def test_right_programs_run(without, user):
    python = sys.executable if user is None else python_for_others()
    sections = [section for section in RIGHT.split("#### ")[1:] if not (without and section.startswith("starts"))]
    programs = [WRAP.format(section=section) for section in sections]
    seen = run(*programs, without=without, user=user, python=python, TRUNCATE="Landlock 3" not in without)
    assert seen.said == []
