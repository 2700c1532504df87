"""Linux namespaces for the fork server: new ones with users of their own, and a root that holds only Python.

Sources: manual pages namespaces, user_namespaces, mount_namespaces, pivot_root, mount, mount_setattr.
"""

import contextlib
import errno
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

from sandbox.syscalls import ALL_NAMESPACES, CLONE_NEWNS, CLONE_NEWPID, call, syscall

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_MOVE = 1, 2, 4, 32, 4096, 8192  # flags of mount(2)
MS_REC, MS_PRIVATE, MNT_DETACH = 16384, 1 << 18, 2
AT_FDCWD, AT_RECURSIVE, PR_SET_PDEATHSIG = -100, 0x8000, 1

NOBODY, PROGRAM_USER = 65534, 1000  # user id of a program if root runs the sandbox: outside and inside the namespace
DIRECTORY = "/sandbox"  # where a program runs
STAGE = "/sandbox-stage"  # where a folder is prepared before it moves to its place
SCRATCH = ("/tmp", "/dev/shm")  # where programs expect that they may write


def enter(sources: list[str], stay_outside: Callable[[], None]) -> bool:
    """Go on as process 1 of new namespaces, as their root, with a file system that holds only the sources. Returns
    whether they have a second user, PROGRAM_USER. The process that called this calls `stay_outside`, which never
    returns: it has the same namespaces, but not that of processes, so no process inside can reach it. A third process
    waits between the two: one whose children are in another namespace of processes can start no threads."""
    uid, gid = os.geteuid(), os.getegid()
    mapped = _unshare_with_maps(uid, gid)
    if os.fork():
        stay_outside()
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    call("unshare", CLONE_NEWPID)
    if os.fork():
        os.closerange(0, 64)  # so that the two others see each other's end
        wait_for_child()
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    _new_root(sources)
    return mapped


def wait_for_child() -> None:
    os._exit(abs(os.waitstatus_to_exitcode(os.wait()[1])))


def _unshare_with_maps(uid: int, gid: int) -> bool:
    """Enter new namespaces of every kind but that of processes, as their root. Returns whether they have a second user
    for programs."""
    ready, tell = os.pipe()
    pid = os.getpid()
    helper = os.fork()  # only a process outside may map users other than itself
    if helper == 0:
        os.close(tell)
        os._exit(_map_users(pid, uid, gid) if os.read(ready, 1) else 0)
    os.close(ready)
    try:
        call("unshare", ALL_NAMESPACES & ~CLONE_NEWPID)
        os.write(tell, b".")
    finally:
        os.close(tell)
        n_users = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if n_users == 0:
        raise PermissionError(errno.EPERM, "user ids cannot be mapped")
    return n_users == 2


def _map_users(pid: int, uid: int, gid: int) -> int:
    """Give the new namespaces of process `pid` their users, and return how many. Root can map a second one for
    programs, which is nobody outside; any other user can map only itself."""
    folder = Path(f"/proc/{pid}")
    if uid == 0:
        with contextlib.suppress(OSError):
            for name in ("uid_map", "gid_map"):
                (folder / name).write_text(f"0 0 1\n{PROGRAM_USER} {NOBODY} 1\n")
            return 2
    with contextlib.suppress(OSError):
        (folder / "setgroups").write_text("deny")
        (folder / "uid_map").write_text(f"0 {uid} 1\n")
        (folder / "gid_map").write_text(f"0 {gid} 1\n")
        return 1
    return 0


def _new_root(sources: list[str]) -> None:
    """Change to a root that holds only the sources, read-only, and empty folders."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    new = "/proc"  # exists on every Linux, and holds no source
    call("mount", b"tmpfs", new.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    read_only = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    for source in sources:
        _bind(source, new + source, sources)
        if not os.path.islink(new + source):
            target = (new + source).encode()
            syscall("mount_setattr", AT_FDCWD, target, AT_RECURSIVE, read_only, len(read_only))
    for folder in (DIRECTORY, STAGE):
        os.mkdir(new + folder)
    for folder in SCRATCH:
        if not os.path.exists(new + folder):  # Python may be below /tmp
            os.symlink(DIRECTORY, new + folder)
    os.chdir(new)
    syscall("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    call("mount", None, b"/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)


def _bind(source: str, target: str, sources: list[str]) -> None:
    """Make `source` appear at `target` too."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        real = os.path.realpath(source)
        if any(real == other or real.startswith(other + "/") for other in sources):
            os.symlink(real, target)
            return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        open(target, "w").close()
    call("mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)


def mount_memory(folder: str, n_bytes: int) -> None:
    """Mount an empty file system in memory, where everybody may write."""
    options = f"size={n_bytes},nr_inodes=4096,mode=777"
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())


def unmount(folder: str) -> None:
    call("umount2", folder.encode(), MNT_DETACH)


def uncover_scratch(sources: list[str], n_bytes: int) -> None:
    """Where Python is below a folder of SCRATCH, replace that folder by a writable one with the same parts of Python,
    for this process and its children. Its judge must not import what a program wrote."""
    for folder in SCRATCH:
        below = [source for source in sources if source.startswith(folder + "/")]
        if below:
            call("unshare", CLONE_NEWNS)
            mount_memory(STAGE, n_bytes)
            for source in below:  # they stay read-only
                _bind(source, STAGE + source.removeprefix(folder), sources)
            call("mount", STAGE.encode(), folder.encode(), None, MS_MOVE, None)
