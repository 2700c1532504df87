"""Confines the fork server and the untrusted programs that it forks: namespaces, Landlock and seccomp on Linux.

Where the kernel allows it, also without privileges, the fork server moves into namespaces of its own. There it is
process 1, without network, in a read-only file system that holds only Python and the system's libraries. A program
forked from it has no capabilities, sees no other process, writes only to fresh memory, and is killed together with all
processes that it started. In a container that forbids namespaces, Landlock limits which files a program reads and
writes, seccomp which system calls it makes (no sockets, no other processes), and where root runs the fork server, the
program is another user. The judge has the same walls around it, and no program can trace it.

System calls go through ctypes. Sources: manual pages namespaces, user_namespaces, pivot_root, landlock, seccomp.
"""

import contextlib
import ctypes
import errno
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sandbox import namespaces
from sandbox.syscalls import call, filter_code, number, set_filter, syscall
from sandbox.verdict import Limits

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38  # options of prctl(2)
CAPABILITIES_V3 = struct.pack("Ii", 0x20080522, 0)  # see capget(2)
FOR_ANOTHER_USER = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "KILL": 5, "SETGID": 6, "SETUID": 7}


class Confinement:
    """Confines a fork server and the programs that it forks, and a judge. Made once, by a process with one thread and
    no other purpose, which splits in two: one returns as the fork server, and the other calls `be_judge`, which never
    returns. The fork server ends with it.

    For each program call `begin`, fork, call `enter` in its process, and `end` when it is over; at last call `leave`.
    The judge calls `enter` once, before the first program, after it has set `layers` to those of the fork server.
    `missing` lists the protections that this machine lacks, each with its consequence. `directory` does not exist yet;
    it is made where programs' folders cannot be in memory. `without` names layers to leave out, for tests:
    "namespaces", "Landlock", "seccomp"; "Landlock 3" leaves Landlock, but no later version than 2.
    """

    def __init__(
        self, directory: str, limits: Limits, without: Collection[str], be_judge: Callable[["Confinement"], None]
    ):
        self.directory, self.limits, self.missing = directory, limits, []
        self.program_user: int | None = None  # the user to become in `enter`; None stays the same
        self.namespaces = self.seccomp = False
        self.landlock = 0  # its version; 0 is none
        self.sources = _readable_paths()
        self.user_tasks: int | None = None  # processes and threads of this user, if they must be counted
        self.counted_at = 0.0
        self.limits_at_first: list[tuple[int, int]] = []
        newest = min((int(name.split()[1]) - 1 for name in without if name.startswith("Landlock ")), default=99)
        with contextlib.suppress(OSError):  # if the machine runs out of memory, kill programs first
            Path("/proc/self/oom_score_adj").write_text("1000")
        os.umask(0o022)  # a program and its judge may read what the other writes

        def try_layer(layer: str, consequence: str, action: Callable[[], object]) -> bool:
            """Returns whether the layer works; else notes it as missing. A child tries it: no layer can be undone."""
            reason = "left out" if layer in without else _failure_in_child(action)
            if reason is not None:
                self.missing.append(f"{layer} ({reason}): {consequence}")
            return reason is None

        if try_layer("namespaces", "programs can see other processes, and start none", self._try_namespaces):
            self._enter_namespaces(lambda: be_judge(self))
            consequence = "programs may make every system call, also one that changes this worker's limits"
        else:
            os.mkdir(directory, 0o700)
            judge = os.getpid()
            if os.fork():
                be_judge(self)
            _end_with_parent(judge)
            self.server = os.getpid()
            consequence = "programs can read and write every file that you can"
            if try_layer("Landlock", consequence, lambda: _landlock(self.sources, directory, newest)):
                self.landlock = min(newest, syscall("landlock_create_ruleset", None, 0, 1))
            consequence = "programs can use the network, signal your other processes and change their limits, change "
            consequence += "the modes of your files, and leave processes behind"
        self.seccomp = try_layer("seccomp", consequence, lambda: set_filter(self._filter()))
        if self.seccomp:
            self._filter()  # cached here for all children
        if sys.platform.startswith("linux"):
            call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # no program of the same user can trace it, or read its memory
            self._choose_user()
        self.limits_at_first = []

    @property
    def layers(self) -> dict[str, Any]:
        """What the fork server found that works."""
        found = {name: getattr(self, name) for name in ("namespaces", "landlock", "seccomp")}
        if self.namespaces:  # no program reaches the judge, so it can have their user, who may write their files
            found["program_user"] = self.program_user
        return found

    @layers.setter
    def layers(self, found: dict[str, Any]) -> None:
        self.__dict__.update(found)

    def leave(self) -> None:
        """Remove the folder that held programs' folders, unless it still holds one."""
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)

    def begin(self) -> str:
        """Returns a new empty directory for a program to run in."""
        self.limits_at_first = self.limits_at_first or _limits()
        if self.namespaces:
            namespaces.mount_memory(namespaces.DIRECTORY, self.limits.file_bytes)
            return namespaces.DIRECTORY
        if self.user_tasks is not None and time.monotonic() - self.counted_at > 1:
            self.user_tasks, self.counted_at = _count_tasks(), time.monotonic()
        directory = tempfile.mkdtemp(dir=self.directory)
        if self.program_user is not None:
            os.chown(directory, self.program_user, os.getegid())  # the judge has this group
            os.chmod(directory, 0o770)
        return directory

    def enter(self, directory: str, judge: bool = False) -> None:
        """Confine this process, which runs a program in `directory`, or the judge, and set its limits. This cannot be
        undone."""
        if not judge and self.namespaces:
            namespaces.uncover_scratch(self.sources, self.limits.file_bytes)
        if self.landlock:
            _landlock(self.sources, directory, self.landlock)
        if self.program_user is not None:
            os.setgroups([])
            os.setresgid(self.program_user, self.program_user, self.program_user)
            os.setresuid(self.program_user, self.program_user, self.program_user)
        self._limit_resources(judge)
        if not sys.platform.startswith("linux"):
            return
        if not judge and not self.namespaces:  # after the change of user, which would clear it
            _end_with_parent(self.server)
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        if number("capset"):
            syscall("capset", CAPABILITIES_V3, bytes(24))  # none
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if self.seccomp:
            set_filter(self._filter(judge))

    def end(self, directory: str, *pids: int) -> dict[int, float]:
        """Kill these processes and all that they started, and remove their directory. Returns the CPU seconds of those
        that were not waited for before."""
        if self.namespaces:  # for process 1, pid -1 means all others in its namespace; one call leaves no time to fork
            _quietly(os.kill, -1, signal.SIGKILL)
        else:
            for pid in pids:
                _quietly(os.killpg, pid, signal.SIGKILL)
                _quietly(os.kill, pid, signal.SIGKILL)
        cpu_seconds = {}
        while ended := _quietly(os.wait4, -1, 0):
            pid, _, usage = ended
            if pid in pids:
                cpu_seconds[pid] = usage.ru_utime + usage.ru_stime
        if self.namespaces:
            namespaces.unmount(namespaces.DIRECTORY)
        else:
            remove(directory)
        return cpu_seconds

    def changed_limits(self) -> bool:
        """Returns whether a program changed limits of this process or the judge; only the lack of a layer allows it."""
        return self.limits_at_first not in ([], _limits())

    def _try_namespaces(self) -> None:
        """Raises OSError unless a program in namespaces would have a directory, and could read Python's files."""
        self._enter_namespaces(namespaces.wait_for_child)
        self.enter(self.begin())
        Path(sysconfig.get_paths()["stdlib"], "os.py").read_bytes()

    def _enter_namespaces(self, stay_outside: Callable[[], None]) -> None:
        """Go on as process 1 of new namespaces."""
        is_root = os.geteuid() == 0
        if namespaces.enter(self.sources, stay_outside):
            self.program_user = namespaces.PROGRAM_USER
        elif is_root:
            self.missing.append(f"user {namespaces.NOBODY}: programs run as root, and start any number of processes")
        for capability in range(64):  # no exec gives a program capabilities; this process keeps its own
            _quietly(call, "prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
        self.namespaces = True

    def _choose_user(self) -> None:
        """Where root would run programs without namespaces, choose another user for them, of this worker alone. Note
        what their user cannot read, and a number of processes that cannot be limited."""
        folders = [os.path.realpath(path) for path in sys.path if path and os.path.exists(path)]
        files = [os.path.join(path, name) for path in folders if os.path.isdir(path) for name in os.listdir(path)]
        if not self.namespaces and os.geteuid() == 0:
            self.program_user = namespaces.NOBODY - 1 - os.getpid() % 4000
            os.chmod(self.directory, 0o711)
            lacking = _lacking_capabilities()
            paths = [os.path.join(self.directory, "any"), *folders]
            if reason := lacking or self._failure_of_program(lambda: _check_readable(paths)):
                self.program_user = None
                self.missing.append(f"another user ({reason}): programs run as root, and start any number of threads")
        if self.program_user is not None:
            if reason := self._failure_of_program(lambda: _check_readable(folders + files)):
                self.missing.append(f"some packages ({reason}): programs cannot import them")
        elif not self.namespaces:
            self.user_tasks = _count_tasks()
            if reason := self._failure_of_program(_start_thread):
                self.user_tasks = None
                self.missing.append(f"a limit of threads ({reason}): programs start any number of them")

    def _failure_of_program(self, action: Callable[[], object]) -> str | None:
        """Returns why a program cannot do `action`; None if it can."""
        directory = self.begin()
        try:
            return _failure_in_child(lambda: (self.enter(directory), action()))
        finally:
            self.end(directory)

    def _limit_resources(self, judge: bool) -> None:
        """Set the limits of this process. That of processes and threads counts all that its user has."""
        limits = self.limits
        values = {"RLIMIT_AS": limits.memory_bytes, "RLIMIT_CORE": 0}
        values |= {"RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_NOFILE": limits.open_files}
        if not judge:  # which serves many checks
            values["RLIMIT_CPU"] = int(limits.timeout_s) + 2
        if self.namespaces or self.program_user is not None:
            values["RLIMIT_NPROC"] = limits.processes
        elif self.user_tasks is not None:  # the programs of other workers count too
            values["RLIMIT_NPROC"] = self.user_tasks + limits.processes * (os.cpu_count() or 1)
        for name, value in values.items():
            try:
                hard = resource.getrlimit(getattr(resource, name))[1]
                most = value + (name == "RLIMIT_CPU")  # a second after SIGXCPU, SIGKILL
                value, most = (n if hard == resource.RLIM_INFINITY else min(n, hard) for n in (value, most))
                resource.setrlimit(getattr(resource, name), (value, most))
            except (OSError, ValueError, AttributeError):
                pass  # macOS has no limit on address space

    def _filter(self, judge: bool = False) -> bytes:
        """Returns the seccomp filter for this process. Outside of the namespace of processes, one may start none."""
        if self.namespaces and not judge:
            return filter_code()
        return filter_code(alone=os.getpid(), truncation=self.namespaces or self.landlock >= 3)


def _readable_paths() -> list[str]:
    """Returns the paths that a program needs to read: Python, its packages, shared libraries."""
    wanted = [sys.prefix, sys.base_prefix, sys.exec_prefix, sysconfig.get_paths()["stdlib"], *sys.path]
    wanted += ["/usr", "/lib", "/lib64", "/bin", "/nix/store", "/etc/alternatives", "/etc/ld.so.cache"]
    wanted += ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
    found = sorted({os.path.abspath(path) for path in wanted if path and os.path.exists(path)} - {"/"})
    return [path for path in found if not any(path.startswith(outer + "/") for outer in found)]


def _landlock(sources: list[str], directory: str, newest: int) -> None:
    """Allow this process to read only the sources, and to write only below `directory`. Uses nothing that Landlock got
    after its version `newest`."""
    if newest < 1:
        raise OSError(errno.ENOSYS, "left out")
    version = min(newest, syscall("landlock_create_ruleset", None, 0, 1))
    execute, write_file, read_file, read_dir, device = 1, 2, 4, 8, 1 << 15
    files = (1 << 12 + min(version, 3)) - 1  # 13 rights; version 2 adds moving between folders, 3 truncating
    if version >= 5:
        files |= device  # commands to devices
    attributes = struct.pack("Q", files)
    if version >= 4:
        attributes += struct.pack("Q", 3)  # network: bind to ports, connect to ports
    if version >= 6:
        attributes += struct.pack("Q", 3)  # scope: connect to abstract sockets, send signals
    ruleset = syscall("landlock_create_ruleset", attributes, len(attributes), 0)
    rules = [(path, execute | read_file | read_dir) for path in sources] + [(directory, files)]
    for path, rights in rules:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if path.startswith("/dev/"):
            rights |= write_file | device
        if not os.path.isdir(path):
            rights &= execute | write_file | read_file | device
        syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", rights & files, fd), 0)
        os.close(fd)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _check_readable(paths: list[str]) -> None:
    """Raises PermissionError at the first path that this process cannot read, and says how to open it."""
    for path in paths:
        if os.path.exists(path) and not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
            raise PermissionError(errno.EACCES, f"{path} is hidden from other users; chmod -R go+rX {path} helps")
    for folder in sorted({folder for path in paths for folder in Path(path).parents}):
        if not os.access(folder, os.X_OK):
            raise PermissionError(errno.EACCES, f"{folder} is closed to other users; chmod go+x {folder} helps")


def _lacking_capabilities() -> str | None:
    """Returns what this process lacks to run programs as another user; None if it has all."""
    found = ctypes.create_string_buffer(24)
    if number("capget") is None:
        return "on an unknown machine"
    syscall("capget", CAPABILITIES_V3, found)
    effective = struct.unpack_from("I", found)[0]
    lacking = [f"CAP_{name}" for name, bit in FOR_ANOTHER_USER.items() if not effective >> bit & 1]
    return f"without {', '.join(lacking)}" if lacking else None


def _start_thread() -> None:
    """Raises OSError if this process cannot start a thread."""
    try:
        threading.Thread(target=int).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "this user has others, out of sight") from error


def _count_tasks() -> int:
    """Returns how many processes and threads this user has, as far as /proc shows."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            found = re.search(rb"\nUid:\t(\d+)(?:.*\n)*?Threads:\t(\d+)", status.read_bytes())
            total += int(found[2]) if found and int(found[1]) == os.getuid() else 0
    return total


def _end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has this
        call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _limits() -> list[tuple[int, int]]:
    """Returns the limits of this process, and of the judge where it is within reach: namespaces show no parent."""
    kinds = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    limit = getattr(resource, "prlimit", lambda _, kind: resource.getrlimit(kind))  # Linux has it
    return [limit(pid, kind) for pid in (0, os.getppid()) for kind in kinds]


def _failure_in_child(action: Callable[[], object], tries: int = 3) -> str | None:
    """Try `action` in a forked process, again if that is killed. Returns why it fails; None if it works."""
    answer, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        reason = "not on this system"
        try:
            action()
            reason = "works"
        except OSError as error:
            reason = error.strerror or str(error)
        finally:
            os.write(tell, reason.encode())
            os._exit(0)
    os.close(tell)
    with open(answer, encoding="utf-8") as file:
        reason = file.read()
    os.waitpid(pid, 0)
    if not reason and tries > 1:
        return _failure_in_child(action, tries - 1)
    return None if reason == "works" else reason or "killed"


def _quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except OSError:
        return None


def remove(directory: str) -> None:
    """Remove a folder that a program left, however deeply nested and whatever its permissions."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", directory], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", directory], stderr=subprocess.DEVNULL)
