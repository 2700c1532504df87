"""System calls: how to make them, their numbers, and the seccomp filter that lists what a program may call.

A program makes raw calls through ctypes, so the filter holds, not Python. It lists what is allowed: a call that a later
kernel adds is answered as by a kernel without it, so that libc does without too, and any other call is refused. What is
left reaches the program's own process and threads, its children, and files that namespaces or Landlock let it open.

Sources: syscall(2), seccomp(2), the kernel's headers asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

import ctypes
import errno
import functools
import os
import platform
import struct

# Calls by name, with their numbers on x86_64 and aarch64. None: not on that machine.
Table = dict[str, tuple[int | None, int | None]]
ALLOWED: Table = {
    # files
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287), "lseek": (8, 62),
    "close": (3, 57), "close_range": (436, 436), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "sendfile": (40, 71), "copy_file_range": (326, 285), "ftruncate": (77, 46),
    "fallocate": (285, 47), "fadvise64": (221, 223), "fsync": (74, 82), "fdatasync": (75, 83),
    "sync_file_range": (277, 84), "flock": (73, 32), "creat": (85, None),
    # names and folders
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "stat": (4, None), "lstat": (6, None),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "unlink": (87, None), "unlinkat": (263, 35),
    "umask": (95, 166), "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11),
    "llistxattr": (195, 12), "flistxattr": (196, 13),
    # memory
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
    "madvise": (28, 233), "msync": (26, 227), "mbind": (237, 235), "get_mempolicy": (239, 236),
    "set_mempolicy": (238, 237),
    # waiting
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19), "signalfd": (282, None),
    "signalfd4": (289, 74), "timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87),
    # pairs of sockets
    "sendto": (44, 206), "sendmsg": (46, 211), "recvfrom": (45, 207), "recvmsg": (47, 212), "shutdown": (48, 210),
    "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209),
    # signals
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "restart_syscall": (219, 128),
    # time
    "time": (201, None), "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "times": (100, 153), "alarm": (37, None),
    "getitimer": (36, 102), "setitimer": (38, 103), "timer_create": (222, 107), "timer_settime": (223, 110),
    "timer_gettime": (224, 108), "timer_getoverrun": (225, 109), "timer_delete": (226, 111),
    # this process, its threads and its children
    "execve": (59, 221), "execveat": (322, 281), "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260),
    "waitid": (247, 95), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgid": (121, 155),
    "getpgrp": (111, None), "setpgid": (109, 154), "getsid": (124, 156), "setsid": (112, 157), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "capget": (125, 90), "futex": (202, 98),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "rseq": (334, 293), "membarrier": (324, 283),
    "arch_prctl": (158, None), "getrlimit": (97, 163), "setrlimit": (160, 164), "getrusage": (98, 165),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_getscheduler": (145, 120),
    "sched_getparam": (143, 121), "sched_getattr": (315, 275), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "sched_rr_get_interval": (148, 127), "getpriority": (140, 141),
    # the system
    "uname": (63, 160), "sysinfo": (99, 179), "getcpu": (309, 168), "getrandom": (318, 278),
}  # fmt: skip
# Without namespaces refused: they start or reach other processes, or change files that Landlock does not protect.
IN_NAMESPACES: Table = {
    "fork": (57, None), "vfork": (58, None), "pidfd_open": (434, 434), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
# Without namespaces they do nothing and report success: Landlock does not check them, and shutil.copy must not fail.
METADATA: Table = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
}  # fmt: skip
# Allowed with some arguments, see `filter_code`.
CHECKED: Table = {
    "open": (2, None), "openat": (257, 56), "truncate": (76, 45), "clone": (56, 220), "kill": (62, 129),
    "tgkill": (234, 131), "prlimit64": (302, 261), "socketpair": (53, 199), "setsockopt": (54, 208), "fcntl": (72, 25),
    "ioctl": (16, 29), "prctl": (157, 167),
}  # fmt: skip
# As if the kernel had not these: libc uses clone and openat, whose arguments a filter can read.
UNKNOWN: Table = {"clone3": (435, 435), "openat2": (437, 437)}
# What confine.py calls before the filter is set; refused after it.
SETUP: Table = {
    "pivot_root": (155, 41), "capset": (126, 91), "mount_setattr": (442, 442), "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
}  # fmt: skip
TABLES = (ALLOWED, IN_NAMESPACES, METADATA, CHECKED, UNKNOWN, SETUP)

# Commands and options that are allowed. Not F_SETOWN, F_SETSIG, FIOSETOWN, SIOCSPGRP: with these the kernel sends any
# signal to any process of the user. Not F_SETLEASE: it holds up others who open a file.
FCNTL = (
    0, 1, 2, 3, 4,  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL
    5, 6, 7, 36, 37, 38,  # F_GETLK, F_SETLK, F_SETLKW, and these three for the open file (F_OFD_)
    1030, 1031, 1032,  # F_DUPFD_CLOEXEC, F_SETPIPE_SZ, F_GETPIPE_SZ
)  # fmt: skip
IOCTL = (
    0x5401, 0x802C542A, 0x5413, 0x540F,  # TCGETS, TCGETS2 (is it a terminal?), TIOCGWINSZ, TIOCGPGRP
    0x541B, 0x5421, 0x5450, 0x5451,  # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
)  # fmt: skip
PRCTL = (
    15, 16, 3, 21, 23, 39,  # PR_SET_NAME and PR_GET_: NAME, DUMPABLE, SECCOMP; PR_CAPBSET_READ, PR_GET_NO_NEW_PRIVS
    38, 0x53564D41,  # PR_SET_NO_NEW_PRIVS, PR_SET_VMA (libc names its memory)
    51, 56,  # PR_SVE_GET_VL, PR_GET_TAGGED_ADDR_CTRL (aarch64)
)  # fmt: skip
SETSOCKOPT = (
    2, 7, 8, 9, 13, 16,  # SO_: REUSEADDR, SNDBUF, RCVBUF, KEEPALIVE, LINGER, PASSCRED
    18, 20, 21,  # RCVLOWAT, RCVTIMEO, SNDTIMEO
)  # fmt: skip
STREAM = 1  # the type of a socket; it may have flags above its lowest four bits
O_TRUNC, O_WRONLY, O_RDWR = 0x200, 1, 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP, CLONE_THREAD = 0x20000000, 0x40000000, 0x2000000, 0x10000
ALL_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP
)

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, EQUAL, AT_LEAST, ANY_BIT, MASK, JUMP, GIVE = 0x20, 0x15, 0x35, 0x45, 0x54, 0x05, 0x06  # BPF instructions
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments have 8 bytes each
OWN = 0x7FFFFFFF  # stands for the process's own id in cached code; no process has it

Code = list[tuple[int, int, int, int]]  # instruction, steps if true, steps if false, value
ALLOW: Code = [(GIVE, 0, 0, 0x7FFF0000)]
PRETEND: Code = [(GIVE, 0, 0, 0x50000)]
REFUSE: Code = [(GIVE, 0, 0, 0x50000 | errno.EPERM)]
DO_NOT_KNOW: Code = [(GIVE, 0, 0, 0x50000 | errno.ENOSYS)]


def number(name: str) -> int | None:
    """Returns a call's number on this machine; None if the machine or the call is unknown there."""
    column = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
    numbers = next(table[name] for table in TABLES if name in table)
    return None if column is None else numbers[column]


def call(name: str, *arguments: bytes | int | None) -> int:
    """Call a function of libc. Raises OSError."""
    # ints are passed as longs, because a variadic prctl reads whole registers
    result = getattr(_libc(), name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def syscall(name: str, *arguments: bytes | int | None) -> int:
    """Make a system call that libc may have no function for. Raises OSError."""
    if number(name) is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return call("syscall", number(name), *arguments)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def set_filter(code: bytes) -> None:
    """Set a seccomp filter for this process and what it starts. This cannot be undone."""
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, 2, program, 0, 0)


def filter_code(alone: int | None = None, truncation: bool = True) -> bytes:
    """Returns a seccomp filter as a BPF program. With `alone`, it is for that process only, which can start no process
    and signal no other. Without `truncation`, nothing else checks who truncates a file. Raises OSError."""
    code = _code(alone is not None, truncation)
    return code if alone is None else code.replace(_pack([(EQUAL, 0, 1, OWN)]), _pack([(EQUAL, 0, 1, alone)]))


@functools.cache
def _code(alone: bool, truncation: bool) -> bytes:
    if platform.machine() not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no filter for {platform.machine()}")
    answers = dict.fromkeys(ALLOWED, ALLOW) | dict.fromkeys(UNKNOWN, DO_NOT_KNOW) | dict.fromkeys(SETUP, REFUSE)
    answers |= dict.fromkeys(METADATA, PRETEND if alone else ALLOW)
    answers |= dict.fromkeys(IN_NAMESPACES, REFUSE if alone else ALLOW)
    answers |= {
        "fcntl": _one_of(1, FCNTL),
        "ioctl": _one_of(1, IOCTL),
        "prctl": _one_of(0, PRCTL),
        "setsockopt": _one_of(2, SETSOCKOPT),
        "prlimit64": _one_of(0, (0,)),
        # Only pairs of streams: a datagram could be sent to any address.
        "socketpair": [_load(1), (MASK, 0, 0, 0xF), (EQUAL, 0, 1, STREAM), *ALLOW, *REFUSE],
        "kill": _one_of(0, (OWN,)) if alone else ALLOW,
        "tgkill": _one_of(0, (OWN,)) if alone else ALLOW,
        "truncate": ALLOW if truncation else REFUSE,
        "open": ALLOW if truncation else _no_odd_truncation(1),
        "openat": ALLOW if truncation else _no_odd_truncation(2),
    }
    if alone:
        answers["clone"] = [_load(0), (ANY_BIT, 0, 1, CLONE_THREAD), *ALLOW, *REFUSE]
    else:
        answers["clone"] = [_load(0), (ANY_BIT, 0, 1, ALL_NAMESPACES), *REFUSE, *ALLOW]
    by_number = {number(name): answer for name, answer in answers.items()}
    highest = max(nr for nr in by_number if nr is not None)
    starts = [(0, by_number.get(0, REFUSE))]  # the least number to get an answer, up to the next one
    for nr in range(1, highest + 1):
        if (answer := by_number.get(nr, REFUSE)) != starts[-1][1]:
            starts.append((nr, answer))
    starts.append((highest + 1, DO_NOT_KNOW))
    if platform.machine() == "x86_64":
        starts.append((0x40000000, REFUSE))  # the x32 calls
    arch = AUDIT_ARCH[platform.machine()]
    return _pack([(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), *REFUSE, (LOAD, 0, 0, NUMBER), *_search(starts)])


def _search(starts: list[tuple[int, Code]]) -> Code:
    """Returns code that gives the answer of the last start that is not above the number that is loaded."""
    if len(starts) == 1:
        return starts[0][1]
    middle = len(starts) // 2
    below = _search(starts[:middle])
    return [(AT_LEAST, 0, 1, starts[middle][0]), (JUMP, 0, 0, len(below)), *below, *_search(starts[middle:])]


def _load(index: int) -> tuple[int, int, int, int]:
    """Returns the instruction that loads the lower half of an argument; the kernel reads no more of those we check."""
    return (LOAD, 0, 0, ARGUMENTS + 8 * index)


def _one_of(index: int, values: tuple[int, ...]) -> Code:
    """Returns code that allows the call if this argument is one of `values`."""
    return [_load(index), *(code for value in values for code in [(EQUAL, 0, 1, value), *ALLOW]), *REFUSE]


def _no_odd_truncation(index: int) -> Code:
    """Returns code that allows to truncate a file only when it is opened for writing. The kernel truncates one that is
    opened for reading too, or for neither (3); Landlock 1 and 2 would not see it."""
    writing = [code for mode in (O_WRONLY, O_RDWR) for code in [(EQUAL, 0, 1, mode), *ALLOW]]
    return [_load(index), (ANY_BIT, 1, 0, O_TRUNC), *ALLOW, (MASK, 0, 0, 3), *writing, *REFUSE]


def _pack(code: Code) -> bytes:
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
