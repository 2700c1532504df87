"""A judge in this process, whose program is another."""

import contextlib
import os
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable, Iterator

import pytest

from sandbox.judge import Judge

Peer = Callable[[socket.socket], object]
Connect = Callable[[Peer], Judge]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """A function that returns a Judge whose other end a new process has, which calls `peer` and ends."""
    for name in ("program", "__main__"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # as a judge does, and here it is undone
    started: list[tuple[socket.socket, int]] = []

    def connect(peer: Peer) -> Judge:
        end, other = socket.socketpair()
        if hasattr(socket, "SO_PASSCRED"):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 10, 0))
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                end.close()
                peer(other)
            finally:
                os._exit(0)
        other.close()
        started.append((end, pid))
        return Judge(end, {})

    yield connect
    for end, pid in started:
        end.close()
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
