"""The judge: a process that runs one check after the other, and holds nothing of the programs that they check.

A check's names of its program stand for objects that stay in the program's process. To call one asks the program
(channel.py); plain data come back as the judge's own. So the judge compares with its own methods and uses its own
modules, and no program can reach the socket on which it tells the verdict.
"""

import builtins
import contextlib
import functools
import importlib
import inspect
import json
import marshal
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

from sandbox.channel import MAX_TEXT, Channel, read_exactly
from sandbox.verdict import HEADER

FILENAME = "<check>"
# Attributes of functions, classes and objects that are no method of a protocol.
FORWARDED = (
    "__annotations__", "__closure__", "__code__", "__defaults__", "__dict__", "__func__", "__kwdefaults__",
    "__members__", "__name__", "__qualname__", "__self__", "__slots__", "__wrapped__",
)  # fmt: skip
FUNCTIONS = (
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodDescriptorType, types.MethodWrapperType,
    types.WrapperDescriptorType, functools.partial,
)  # fmt: skip
MAX_ITEMS = 1_000_000  # of an iterator of the program


class NeedsSharing(BaseException):
    """The check does what cannot cross to another process. `Judge.needs_sharing` stays, even if it catches this."""


def serve_checks(control: socket.socket, timeout_s: float) -> None:
    """Read requests, have the fork server at `control` start their programs, and tell it the verdicts. Returns when the
    parent or the fork server has gone."""
    signal.signal(signal.SIGCHLD, lambda *_: os._exit(0))  # the fork server has gone, whatever a check does
    restore = _restorer()
    with contextlib.suppress(EOFError, OSError):
        while True:
            header = read_exactly(struct.calcsize(HEADER))
            shared, check_size, _ = struct.unpack(HEADER, header)
            if shared:
                control.sendall(header)
            else:
                payload = read_exactly(check_size)
                signal.setitimer(signal.ITIMER_VIRTUAL, timeout_s + 2)  # so that no loop in C goes on for ever
                _serve_check(control, header, payload)
                restore()
            control.recv(1)  # nothing is left of the program


def _serve_check(control: socket.socket, header: bytes, payload: bytes) -> None:
    """Judge one program. The verdict is JSON: passed, needs_sharing, fault, or error with message and line; and `last`,
    if this process should not judge another one."""
    check, entry_point, n_lines, modules = marshal.loads(payload)
    end, program_end = socket.socketpair()  # unlike pipes, they cannot be opened for reading through /proc
    if hasattr(socket, "SO_PASSCRED"):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with end:
        with program_end:
            socket.send_fds(control, [header], [program_end.fileno()])
        judge = Judge(end, modules)
        error: BaseException | None = None
        try:
            tempfile.tempdir = judge.greet()
            os.chdir(tempfile.tempdir)
            control.sendall(b".")
            judge.ask("run")
            code = compile(check, FILENAME, "exec", dont_inherit=True) if isinstance(check, str) else check
            exec(code, {"__builtins__": judge.builtins_of_check(entry_point)})
        except BaseException as raised:
            error = raised
        if judge.fault is not None:
            verdict: dict[str, Any] = {"fault": judge.fault}
        elif judge.needs_sharing is not None:
            verdict = {"needs_sharing": judge.needs_sharing}
        else:
            verdict = {"passed": True} if error is None else _failure(error, n_lines)
    verdict["last"] = threading.active_count() > 1 or isinstance(error, MemoryError)
    control.sendall(json.dumps(verdict).encode() + b"\n")


def _restorer() -> Callable[[], None]:
    """Returns a function that undoes what checks usually leave behind, which later ones should not find."""
    names, state, limit = dict(builtins.__dict__), random.getstate(), sys.getrecursionlimit()

    def restore() -> None:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL):
            signal.setitimer(timer, 0)
        os.chdir("/")
        random.setstate(state)
        sys.setrecursionlimit(limit)
        builtins.__dict__.clear()
        builtins.__dict__.update(names)
        for name in ("stdin", "stdout", "stderr"):
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115

    restore()
    return restore


def _failure(error: BaseException, n_lines: int) -> dict[str, Any]:
    """The exception's name, message and line, which is that of the program if it was raised there."""
    if "_remote_" in getattr(error, "__dict__", {}):
        name, message, line = error.__dict__["_remote_"]
    else:
        name, message, line = type(error).__name__, str(error)[:MAX_TEXT], None
        if isinstance(error, SyntaxError) and error.filename == FILENAME and error.lineno:
            line = n_lines + error.lineno
    trace = error.__traceback__ if line is None else None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILENAME:
            line = n_lines + trace.tb_lineno
        trace = trace.tb_next
    return {"error": name, "message": message, "line": line}


class Judge(Channel):
    """The judge's end of the channel."""

    def __init__(self, end: socket.socket, modules: dict[str, str]):
        super().__init__(end)
        self.modules = modules  # that are the judge's own, whatever the program calls so, by what the check calls them
        self.needs_sharing: str | None = None  # why the check has to run beside the program
        self.n_answers = 0  # that are being given to the program
        self.methods = {"__getattr__": lambda record, name: _method_of_record(self, record, name)}
        sys.modules["program"] = sys.modules["__main__"] = _ProgramModule(self)

    def greet(self) -> str:
        """Wait for the program, whose first message tells its process and its folder. Raises Closed."""
        piece, self.partner = self._receive_some(2**12, 0)
        if not piece:
            raise self.close("left")
        return piece.decode()

    def builtins_of_check(self, entry_point: str) -> dict[str, Any]:
        """Where Python looks up a name that is not the check's own: a builtin, except `entry_point`, or the program's."""
        names = _CheckBuiltins(builtins.__dict__)
        names.pop(entry_point, None)
        names.look_up = self.look_up
        return names

    def look_up(self, name: str) -> Any:
        """Returns what the program calls `name`; a module of that name is the judge's own. Raises KeyError."""
        value = self.ask("name", name)
        if name in self.modules:
            return importlib.import_module(self.modules[name])
        if isinstance(value, RemoteCallable) and name[0].isupper():  # as a class is called; the check's word for it
            object.__setattr__(value, "_is_class_", True)
        return value

    def share(self, reason: str) -> BaseException:
        """Returns what to raise where a value cannot cross. It is the check alone that may cause sharing, so what the
        program asks for fails instead."""
        if self.n_answers:
            return TypeError(reason)
        self.needs_sharing = reason
        return NeedsSharing()

    def answer(self, question: list) -> None:
        self.n_answers += 1
        try:
            super().answer(question)
        finally:
            self.n_answers -= 1

    def perform(self, operation: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """What the program may ask for: to call a function that the check gave it, or the next item of an iterator."""
        if operation not in ("call", "next") or not any(arguments[0] is value for value in self.lent):
            raise PermissionError("not for programs that are judged")
        return arguments[0](*arguments[1:], **keywords) if operation == "call" else next(arguments[0])

    def describe(self, value: Any) -> list:
        if isinstance(value, FUNCTIONS):
            return self.lend(value, "function", getattr(value, "__name__", "function"), value.__doc__, _parameters(value))
        if hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools"):
            return self.lend(value, "iterator", "", None, None)
        for base in (int, float, str, bytes):
            if isinstance(value, base):
                return self._encoder().encode(base(value))
        raise self.share(f"an object of type {type(value).__name__} of the check cannot be sent to the program")

    def stand_in(self, number: int, name: str, kind: str, data: Any) -> Any:
        """What the check gets for an object of the program that is no plain data. `data`: the plain value of one whose
        type is derived from int, float, str or bytes."""
        name = name if name.isidentifier() else "object"
        if data is not None:
            value = self._decoder().decode(data)
            return type(name, (type(value),), {"__getattr__": _attribute_of(self)})(value)
        remote = _remote_class(name, KINDS[kind])(self)
        if kind != "coroutine":
            return remote
        self.numbers[id(remote)] = ["yours", number]
        return _await(remote)


class _CheckBuiltins(dict):
    """The `__builtins__` of a check."""

    look_up: Callable[[str], Any]

    def __missing__(self, name: str) -> Any:
        return self.look_up(name)


class _ProgramModule(types.ModuleType):
    """What a check gets when it imports `program`."""

    def __init__(self, judge: Judge):
        super().__init__("program")
        self.__dict__.update(_judge_=judge, __display__=functools.partial(judge.ask, "display"))

    def __getattr__(self, name: str) -> Any:
        try:
            return self._judge_.look_up(name)
        except KeyError:
            raise AttributeError(f"the program has no {name}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._judge_.ask("set name", name, value)


def _forward(operation: str) -> Callable[..., Any]:
    def method(self: "Remote", *arguments: Any, **keywords: Any) -> Any:
        return self._judge_.ask(operation, self, *arguments, **keywords)

    return method


def _between(operation: str) -> Callable[..., Any]:
    """An operator for two objects of the program. With any other it does not exist, because the program would choose
    the outcome, knowing what the check expects. Unless the check made the object itself, of a class: then its operators
    are what it tests."""

    def method(self: "Remote", other: Any) -> Any:
        if isinstance(other, Remote):
            return self._judge_.ask(operation, self, other) if operation in OPERATORS else NotImplemented
        if self._is_made_ and other is not None:
            raise self._judge_.share(f"the check uses an operator of {type(self).__name__}, a class of the program")
        return NotImplemented

    return method


def _attribute_of(judge: Judge) -> Callable[[Any, str], Any]:
    """The `__getattr__` of what stands for an object of the program. Names of protocols are not looked up there:
    numpy's would let the program read the judge's memory, or choose the outcome of a comparison."""

    def get(self: Any, name: str) -> Any:
        if name.startswith("__") and name not in FORWARDED:
            raise AttributeError(name)
        return judge.ask("getattr", self, name)

    return get


class Remote:
    """An object of the program. What the check does with it, the program does, but for comparisons with other values."""

    __slots__ = ("__weakref__", "_is_class_", "_is_made_", "_judge_")

    def __init__(self, judge: Judge):
        for name, value in {"_judge_": judge, "_is_class_": False, "_is_made_": False}.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return _attribute_of(self._judge_)(self, name)

    def __deepcopy__(self, memo: dict) -> Any:
        return self._judge_.ask("deepcopy", self)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> Any:
        return self._judge_.ask("exit", self, kind, error and error.args)

    def __mro_entries__(self, bases: tuple) -> tuple:
        raise self._judge_.share("the check derives a class from one of the program")


for _name in "setattr delattr getitem setitem delitem len bool iter str repr format int float complex index round "\
        "trunc floor ceil abs neg pos invert reversed dir enter copy hash instancecheck subclasscheck".split():
    setattr(Remote, f"__{_name}__", _forward(_name))
OPERATORS = "eq ne lt le gt ge add sub mul matmul truediv floordiv mod pow lshift rshift and or xor".split()
for _name in [*OPERATORS, *(f"r{name}" for name in OPERATORS[6:])]:
    setattr(Remote, f"__{_name}__", _between(_name))


class RemoteCallable(Remote):
    __slots__ = ()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        value = self._judge_.ask("make" if self._is_class_ else "call", self, *arguments, **keywords)
        if self._is_class_ and isinstance(value, Remote):
            object.__setattr__(value, "_is_made_", True)
        return value


class RemoteIterator(Remote):
    __slots__ = ("_n_items",)

    def __init__(self, judge: Judge):
        super().__init__(judge)
        object.__setattr__(self, "_n_items", 0)

    def __iter__(self) -> "RemoteIterator":
        return self

    def __next__(self) -> Any:
        object.__setattr__(self, "_n_items", self._n_items + 1)
        if self._n_items > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS} items from an iterator of the program")
        return self._judge_.ask("next", self)

    def send(self, value: Any) -> Any:
        return self._judge_.ask("send", self, value)

    def throw(self, kind: Any, *arguments: Any) -> Any:
        error = kind if isinstance(kind, BaseException) else kind(*arguments[:1])
        return self._judge_.ask("throw", self, type(error), *error.args)


KINDS = {"object": Remote, "callable": RemoteCallable, "iterator": RemoteIterator, "coroutine": Remote}


@functools.lru_cache(256)
def _remote_class(name: str, base: type) -> type:
    doc = property(lambda remote: remote._judge_.ask("getattr", remote, "__doc__"))
    return type(name, (base,), {"__slots__": (), "__doc__": doc})


async def _await(remote: Remote) -> Any:
    return remote._judge_.ask("await", remote)


def _parameters(function: Any) -> list[list] | None:
    """The name, the kind and whether there is a default, of each parameter of a function."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [[p.name, int(p.kind), p.default is not p.empty] for p in parameters]


def _method_of_record(judge: Judge, record: Any, name: str) -> Any:
    """Looks up what a named tuple or a dataclass of the program has besides its fields."""
    if name.startswith("__"):
        raise AttributeError(name)
    value = judge.ask("getattr", record, name)
    return functools.partial(judge.ask, "call method", record, name) if isinstance(value, RemoteCallable) else value
