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
import mmap
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from sandbox.channel import MAX_TEXT, Channel, read_exactly
from sandbox.checks import ALIASES
from sandbox.remote import Remote, RemoteCallable, attribute_of, awaited, remote_class
from sandbox.verdict import HEADER

FILENAME = "<check>"
PLAIN_KEYS = (type(None), bool, int, float, str, bytes)
FUNCTIONS = (
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodDescriptorType,
    types.MethodWrapperType, types.WrapperDescriptorType, functools.partial,
)  # fmt: skip


class NeedsSharing(BaseException):
    """The check does what cannot cross to another process. `Judge.needs_sharing` stays, even if it catches this."""


def serve_checks(control: socket.socket, answers_fd: int, clock: mmap.mmap, timeout_s: float) -> None:
    """Read requests, have the fork server at `control` start their programs, and tell it the verdicts. The words of a
    verdict go to the parent on `answers_fd`. `clock` gets this process's processor time, while it computes. Returns
    when the parent or the fork server has gone."""
    signal.signal(signal.SIGPROF, lambda *_: struct.pack_into("d", clock, 0, time.process_time()))
    restore = _restorer()
    with contextlib.suppress(EOFError, OSError):
        while True:
            header = read_exactly(struct.calcsize(HEADER))
            shared, check_size, _ = struct.unpack(HEADER, header)
            if shared:
                control.sendall(header)
            else:
                payload = read_exactly(check_size)
                signal.setitimer(signal.ITIMER_VIRTUAL, 2 * timeout_s + 2)  # so that no loop in C goes on for ever
                signal.setitimer(signal.ITIMER_PROF, 0.1, 0.1)
                _serve_check(control, answers_fd, header, payload)
                restore()
            control.recv(1)  # nothing is left of the program


def read_clock(clock: mmap.mmap) -> float:
    return struct.unpack_from("d", clock)[0]


def _serve_check(control: socket.socket, answers_fd: int, header: bytes, payload: bytes) -> None:
    """Judge one program. The verdict is JSON: passed, needs_sharing, fault, or error and line; `shared`, if the program
    compared objects of its own; `words`, if the exception's message or the reason for sharing went to the parent; and
    `last`, if this process should not judge another program."""
    check, entry_point, n_lines, modules, seeds = marshal.loads(payload)
    end, program_end = socket.socketpair()  # unlike pipes, they cannot be opened for reading through /proc
    if hasattr(socket, "SO_PASSCRED"):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with end:
        with program_end:
            socket.send_fds(control, [header], [program_end.fileno()])
        judge = Judge(end, modules)
        failure: dict[str, Any] = {"passed": True}
        try:
            tempfile.tempdir = judge.greet()
            os.chdir(tempfile.tempdir)
            control.sendall(b".")
            judge.ask("run")
            for name in seeds:
                judge.seed_both(name)
            code = compile(check, FILENAME, "exec", dont_inherit=True) if isinstance(check, str) else check
            names = vars(sys.modules["__main__"])  # unittest.main finds them there
            del names["__name__"]
            names["__builtins__"] = judge.builtins_of_check(entry_point)
            exec(code, names)
        except BaseException as error:
            failure = _failure(error, n_lines)
        judge.undo.close()
        if judge.fault is not None:
            verdict: dict[str, Any] = {"fault": judge.fault}
        elif judge.needs_sharing is not None:
            verdict = {"needs_sharing": judge.needs_sharing}
        else:
            verdict = failure | ({"shared": True} if judge.compared else {})
    if words := verdict.pop("message", "") or verdict.get("needs_sharing"):
        os.write(answers_fd, json.dumps({"words": words[:MAX_TEXT]}).encode() + b"\n")
        verdict |= {"words": True} | ({"needs_sharing": True} if judge.needs_sharing else {})
    verdict["last"] = threading.active_count() > 1 or verdict.get("error") == "MemoryError"
    control.sendall(json.dumps(verdict).encode() + b"\n")


def _restorer() -> Callable[[], None]:
    """Returns a function that undoes what checks usually leave behind, which later ones should not find."""
    names, state, limit = dict(builtins.__dict__), random.getstate(), sys.getrecursionlimit()
    path, filters, streams = [*sys.path], [*warnings.filters], dict[str, Any]()

    def restore() -> None:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        sys.path[:], warnings.filters[:] = path, filters
        os.chdir("/")
        random.setstate(state)
        sys.setrecursionlimit(limit)
        builtins.__dict__.clear()
        builtins.__dict__.update(names)
        for name in ("stdin", "stdout", "stderr"):
            if name not in streams or streams[name].closed:
                streams[name] = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
            setattr(sys, name, streams[name])

    restore()
    return restore


def _failure(error: BaseException, n_lines: int) -> dict[str, Any]:
    """The exception's name, message and line, which is that of the program if it was raised there."""
    if "_remote_" in getattr(error, "__dict__", {}):
        name, message, line = error.__dict__["_remote_"]
    else:
        name, message, line = type(error).__name__, "", None
        with contextlib.suppress(BaseException):  # it may hold an object of the program
            message = str(error)[:MAX_TEXT]
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

    def __init__(self, end: socket.socket, modules: dict[str, list[str]]):
        super().__init__(end)
        self.modules = modules  # that are the judge's own, whatever the program calls so: see Check.modules
        self.needs_sharing: str | None = None  # why the check has to run beside the program
        self.n_answers = 0  # that are being given to the program
        self.answers: dict[tuple, tuple] = {}  # by `read`, with the arguments
        self.compared = False  # whether the program compared objects of its own
        self.awaited: list[Remote] = []  # kept, because their ids stand for them
        self.undo = contextlib.ExitStack()  # what later checks must not find
        self.methods = {"__getattr__": lambda record, name: _method_of_record(self, record, name)}
        sys.modules["program"], sys.modules["__main__"] = _ProgramModule(self), _ProgramModule(self)

    def greet(self) -> str:
        """Wait for the program, whose first message tells its process and its folder. Raises Closed."""
        piece, self.partner = self._receive_some(0)
        if not piece:
            raise self.close("left")
        return piece.decode()

    def builtins_of_check(self, entry_point: str) -> dict[str, Any]:
        """Where Python looks up a name that is not the check's own: a builtin, or what the program calls `entry_point`
        or otherwise."""
        names = _CheckBuiltins(builtins.__dict__)
        names.pop(entry_point, None)
        names.look_up = self.look_up
        return names

    def seed_both(self, name: str) -> None:
        """Make `seed` of a module seed that of the program, too."""
        module = importlib.import_module(name)
        seed = module.seed
        self.undo.callback(setattr, module, "seed", seed)

        def seed_both(*arguments: Any, **keywords: Any) -> None:
            seed(*arguments, **keywords)
            self.act("seed", name, *arguments, **keywords)

        module.seed = seed_both

    def read(self, operation: str, *arguments: Any) -> Any:
        """Ask for something that stays the same as long as the check has the program do nothing. A second answer could
        be another one, for what a check does with it."""
        key = (operation, *((type(v), v if isinstance(v, PLAIN_KEYS) else id(v)) for v in arguments))
        if key not in self.answers:
            self.answers[key] = self.ask(operation, *arguments), arguments  # kept, because their ids stand for them
        return self.answers[key][0]

    def act(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        """Have the program do something, after which its objects may be others."""
        self.answers.clear()
        return self.ask(operation, *arguments, **keywords)

    def look_up(self, name: str) -> Any:
        """Returns what the program calls `name`; a module of that name is the judge's own. Raises KeyError."""
        value = self.read("name", name)
        if name in self.modules:
            with contextlib.suppress(ImportError):
                module = importlib.import_module(ALIASES.get(name, name))
                if all(hasattr(module, attribute) for attribute in self.modules[name]):
                    return module
        if isinstance(value, RemoteCallable) and name[0].isupper():  # as a class is called
            object.__setattr__(value, "_operation_", "make")
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
            name = getattr(value, "__name__", "function")
            return self.lend(value, "function", name, value.__doc__, _parameters(value))
        if hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools"):
            return self.lend(value, "iterator", "", None, None)
        for base in (int, float, str, bytes):
            if isinstance(value, base):
                return self._encoder().encode(base(value))
        raise self.share(f"an object of type {type(value).__name__} of the check cannot be sent to the program")

    def stand_in(self, number: int, name: str, kind: str, data: Any) -> Any:
        """What the check gets for an object of the program that is no plain data. `data`: the plain value of one whose
        type is derived from int, float, str or bytes."""
        name = name[:80] if name.isidentifier() else "object"
        if data is not None:
            value = self._decoder().decode(data)
            if type(value) not in (int, float, str, bytes):
                raise ValueError("not from an encoder")
            return type(name, (type(value),), {"__getattr__": attribute_of(self)})(value)
        remote = remote_class(name, kind)(self)
        if kind != "coroutine":
            return remote
        self.numbers[id(remote)] = ["yours", number]
        self.awaited.append(remote)
        return awaited(remote)


class _CheckBuiltins(dict):
    """The `__builtins__` of a check."""

    look_up: Callable[[str], Any]

    def __missing__(self, name: str) -> Any:
        return self.look_up(name)


class _ProgramModule(types.ModuleType):
    """What a check gets when it imports `program`."""

    def __init__(self, judge: Judge):
        super().__init__("program")
        self.__dict__.update(_judge_=judge, __display__=functools.partial(judge.act, "display"))

    def __getattr__(self, name: str) -> Any:
        try:
            return self._judge_.look_up(name)
        except KeyError:
            raise AttributeError(f"the program has no {name}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._judge_.act("set name", name, value)


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
    value = judge.read("getattr", record, name)
    return functools.partial(judge.act, "call method", record, name) if isinstance(value, RemoteCallable) else value
