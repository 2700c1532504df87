"""The table of system calls agrees with the kernel's headers, and the filter answers every number as the table says."""

import errno
import platform
import re
import struct
from pathlib import Path

import pytest

from sandbox import syscalls
from sandbox.syscalls import CHECKED, FCNTL, IOCTL, PRCTL, TABLES, filter_code, number

HEADERS = {  # of linux-libc-dev; the first that exists
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}
ALLOW, REFUSE, DO_NOT_KNOW, PRETEND = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x50000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PID = 77


@pytest.fixture(params=ARCH)
def machine(request, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: request.param)
    syscalls._code.cache_clear()
    yield request.param
    syscalls._code.cache_clear()


def answer(code: bytes, nr: int, *arguments: int, arch: int | None = None) -> int:
    """What the filter gives for a call: the kernel's interpreter, as far as the filter uses it."""
    data = struct.pack("iIQ6Q", nr, arch or ARCH[platform.machine()], 0, *(*arguments, *[0] * 6)[:6])
    at, value = 0, 0
    while True:
        kind, if_true, if_false, k = struct.unpack_from("HBBI", code, 8 * at)
        at += 1
        if kind == 0x06:
            return k
        elif kind == 0x20:
            value = struct.unpack_from("I", data, k)[0]
        elif kind == 0x54:
            value &= k
        elif kind == 0x05:
            at += k
        else:
            at += if_true if {0x15: value == k, 0x35: value >= k, 0x45: value & k}[kind] else if_false


def test_the_numbers_are_the_kernels(machine):
    header = next((Path(name) for name in HEADERS[machine] if Path(name).exists()), None)
    if header is None:
        pytest.skip("no kernel headers here")
    defined = dict(re.findall(r"#define (__NR\w+)\s+(\w+)", header.read_text()))
    for name, numbers in ((name, numbers) for table in TABLES for name, numbers in table.items()):
        found = defined.get(f"__NR_{name}")
        found = defined.get(found, found)  # some are defined as another name
        wanted = numbers[machine == "aarch64"]
        if wanted is not None and found is not None:  # an older header lacks newer calls
            assert wanted == int(found), name
        if wanted is None:
            assert found is None or not found.isdecimal(), name
    assert len(defined) > 300


@pytest.mark.parametrize("alone", [None, PID])
def test_every_number_gets_the_answer_of_its_table(machine, alone):
    code = filter_code(alone)
    names = {number(name): name for table in TABLES for name in table}
    for nr in range(max(n for n in names if n is not None) + 1):
        name = names.get(nr)
        wanted = REFUSE
        if name in CHECKED:
            continue
        if name in syscalls.ALLOWED or (alone is None and name in (*syscalls.IN_NAMESPACES, *syscalls.METADATA)):
            wanted = ALLOW
        elif name in syscalls.METADATA:
            wanted = PRETEND
        elif name in syscalls.UNKNOWN:
            wanted = DO_NOT_KNOW
        assert answer(code, nr) == wanted, (nr, name)
    assert answer(code, 463) == answer(code, 469) == answer(code, 9999) == DO_NOT_KNOW  # setxattrat, file_setattr
    assert answer(code, number("read"), arch=0x40000003) == REFUSE  # of 32 bits
    if machine == "x86_64":
        assert answer(code, 0x40000000) == answer(code, 0x40000000 + 520) == REFUSE


def test_arguments_decide_where_a_call_has_two_sides(machine):
    inside, alone, before_landlock_3 = filter_code(), filter_code(PID), filter_code(PID, truncation=False)

    def allowed(code, name, *arguments):
        return answer(code, number(name), *arguments) == ALLOW

    for code in (inside, alone):
        assert all(allowed(code, "fcntl", 3, command) for command in FCNTL)
        assert not any(allowed(code, "fcntl", 3, command) for command in (8, 10, 15, 1024, 1026))  # F_SETOWN, F_SETSIG
        assert all(allowed(code, "ioctl", 3, command) for command in IOCTL)
        # FIOSETOWN, SIOCSPGRP, FIOASYNC, TIOCSTI, TIOCSPGRP, FS_IOC_SETFLAGS
        assert not any(allowed(code, "ioctl", 3, c) for c in (0x8901, 0x8902, 0x5452, 0x5412, 0x5410, 0x40086602))
        assert all(allowed(code, "prctl", option) for option in PRCTL)
        assert not any(allowed(code, "prctl", option) for option in (1, 4, 22, 36, 0x59616D61))  # PR_SET_PDEATHSIG
        assert allowed(code, "socketpair", 1, 1 | 0o2000000) and not allowed(code, "socketpair", 1, 2)
        assert allowed(code, "setsockopt", 3, 1, 16) and not allowed(code, "setsockopt", 3, 1, 26)  # SO_ATTACH_FILTER
        assert allowed(code, "prlimit64", 0) and not allowed(code, "prlimit64", PID + 1)
        assert allowed(code, "clone", 0x3D0F00) and not allowed(code, "clone", 0x10000000 | 17)  # a thread; a namespace
    assert allowed(inside, "clone", 17) and not allowed(alone, "clone", 17)
    for name in ("kill", "tgkill"):
        assert allowed(alone, name, PID) and not any(allowed(alone, name, pid) for pid in (0, 1, PID + 1, 2**32 - 1))
    assert allowed(alone, "truncate") and not allowed(before_landlock_3, "truncate")
    place = 2
    for flags, wanted in ((0, True), (0x241, True), (0x202, True), (0x200, False), (0x203, False), (3, True)):
        assert allowed(before_landlock_3, "openat", *[0] * place, flags) is wanted
        assert allowed(alone, "openat", *[0] * place, flags)
