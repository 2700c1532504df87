"""What no channel sends is a fault that stays, only one process is heard, and exceptions arrive as what they are."""

import marshal
import os
import select
import socket
import struct
import sys
from collections.abc import Callable

import pytest

from sandbox.channel import Closed
from sandbox.runner import run_program


def frame(text: bytes) -> bytes:
    return struct.pack(">Q", len(text)) + text


def program(text: str) -> Callable[[socket.socket], None]:
    """A peer that runs it."""
    return lambda end: run_program(end, marshal.dumps((text, [])), "/")


SEVEN = frame(b'["return", 7, []]')
FAULTS = {
    "an answer too early": (True, SEVEN, "answered before it was asked"),
    "a byte too early": (True, b"\0", "answered before it was asked"),
    "too long": (False, struct.pack(">Q", 2**26 + 1), "sent too long a message"),
    "no JSON": (False, frame(b"seven"), "sent what is no message"),
    "no list": (False, frame(b"7"), "sent what is no message"),
    "an object": (False, frame(b'["return", {"a": 7}, []]'), "sent what is no message"),
    "deep": (False, frame(b"[" * 2**20), "sent what is no message"),
    "five parts": (False, frame(b"[1, 2, 3, 4, 5]"), "sent what is no message"),
    "an unknown kind": (False, frame(b'["neither", 7, []]'), "sent what is no answer (TypeError)"),
    "an unknown tag": (False, frame(b'["return", ["pickle", "gA=="], []]'), "sent what is no answer (ValueError)"),
    "what was never lent": (False, frame(b'["return", ["yours", 5], []]'), "sent what is no answer (IndexError)"),
    "the last that was lent": (False, frame(b'["return", ["yours", -1], []]'), "sent what is no answer (ValueError)"),
    "an unknown exception": (
        False, frame(b'["raise", [["exception", "Exit"], null, null, "", 1], []]'), "sent what is no answer (KeyError)"
    ),
    "no question": (False, frame(b"[1, 2, 3, 4]"), "asked what is no question (TypeError)"),
    "half a message": (False, SEVEN[:-3], "left"),
    "nothing": (False, b"", "left"),
}  # fmt: skip


@pytest.mark.parametrize(("early", "data", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_fault_stays_although_the_check_catches_everything(connect, early, data, fault):
    def peer(end: socket.socket) -> None:
        if not early:
            end.recv(2**16)
        end.sendall(data)
        if fault != "left":
            while end.recv(2**16):
                end.sendall(SEVEN)

    judge = connect(peer)
    if early:
        select.select([judge.end], [], [], 10)
    check = "for i in range(3):\n    try:\n        f(i)\n    except BaseException:\n        pass"
    exec(check, {"__builtins__": judge.builtins_of_check("f")})
    assert judge.fault == fault
    with pytest.raises(Closed):
        judge.ask("name", "f")
    assert judge.fault == fault


@pytest.mark.skipif(not hasattr(socket, "SO_PASSCRED"), reason="sockets do not tell who sent a message")
def test_what_another_process_writes_is_not_heard(connect):
    def lie(end: socket.socket, data: bytes) -> None:
        if os.fork() == 0:
            end.sendall(data)
            os._exit(0)
        os.wait()

    def peer(end: socket.socket) -> None:
        end.sendall(b"/folder")
        end.recv(2**16)
        lie(end, frame(b'["return", 1, []]'))
        end.sendall(SEVEN[:11])
        lie(end, b"\0\0")
        end.sendall(SEVEN[11:])
        lie(end, frame(b'["return", 2, []]'))  # before a question
        end.recv(2**16)
        end.sendall(SEVEN)
        end.recv(2**16)

    judge = connect(peer)
    assert judge.greet() == "/folder"
    assert [judge.ask("name", "f"), judge.ask("name", "f"), judge.fault] == [7, 7, None]


def test_what_is_too_large_to_send_raises_on_the_side_that_asked_and_the_channel_goes_on(connect, monkeypatch):
    monkeypatch.setattr("sandbox.channel.MAX_BYTES", 1000)
    judge = connect(program("def twice(x): return 2 * x\ndef fill(x): x.append('x' * 1000)"))
    judge.greet()
    judge.ask("run")
    twice, fill, items = judge.look_up("twice"), judge.look_up("fill"), [1]
    for function, argument in [(twice, "x" * 1000), (twice, "x" * 600), (fill, items)]:
        with pytest.raises(ValueError, match="too large to send"):
            function(argument)
    assert (twice("x" * 200), items, judge.fault) == ("x" * 400, [1], None)


CLASSES = """
class Own(Exception): pass
class OwnLookup(Own, LookupError): pass
class OwnKey(KeyError): pass
class OwnStop(StopIteration): pass
class OwnUnicode(UnicodeError): pass
class OwnSystem(OSError): pass
class OwnTimeout(TimeoutError): pass
class OwnMemory(MemoryError): pass
class Odd(Exception):
    def __init__(self, a, *, b): self.a, self.b = a, b
    def __str__(self): return f'{self.a} and {self.b}'
def own(): raise Own('it', 2)
def several(): raise OwnLookup('it', 2)
def key(): raise OwnKey('it', 2)
def unicode(): raise OwnUnicode('it', 2)
def system(): raise OwnSystem('it', 2)
def timeout(): raise OwnTimeout('it', 2)
def memory(): raise OwnMemory('it', 2)
def missing(): open('/no/such')
def decode(): b'\\xff'.decode()
def odd(): raise Odd(1, b=[2])
"""
CAUGHT = [
    ("own", "Own", "e.args == ('it', 2)"), ("own", "Exception", "type(e) is Own"), ("several", "Own", "True"),
    ("several", "OwnLookup", "e.args == ('it', 2)"), ("several", "LookupError", "True"),
    ("key", "OwnKey", "e.args == ('it', 2)"), ("key", "KeyError", "True"), ("unicode", "OwnUnicode", "True"),
    ("system", "OwnSystem", "True"), ("system", "OSError", "True"), ("timeout", "TimeoutError", "True"),
    ("memory", "OwnMemory", "True"), ("missing", "FileNotFoundError", "(e.errno, e.filename) == (2, '/no/such')"),
    ("decode", "UnicodeDecodeError", "e.object == b'\\xff' and e.start == 0"),
    ("odd", "Odd", "str(e) == '1 and [2]' and e.b == [2]"),
]  # fmt: skip


@pytest.mark.parametrize(("raising", "kind", "what"), CAUGHT, ids=[f"{case[0]} as {case[1]}" for case in CAUGHT])
def test_an_exception_of_the_program_is_caught_by_its_class_and_by_every_base(connect, raising, kind, what):
    judge = connect(program(CLASSES))
    judge.greet()
    judge.ask("run")
    check = f"try:\n    {raising}()\nexcept {kind} as e:\n    assert {what}, e\nelse:\n    assert 0"
    exec(check, {"__builtins__": judge.builtins_of_check("")})


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no groups")
def test_a_group_of_exceptions_is_no_fault(connect):
    judge = connect(program("def f(): raise ExceptionGroup('several', [ValueError(1), KeyError(2)])"))
    judge.greet()
    judge.ask("run")
    with pytest.raises(Exception, match="several"):
        judge.look_up("f")()
    assert judge.fault is None
