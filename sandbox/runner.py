"""The program's end of the channel: runs the program, then does what its judge asks for.

Nothing here is kept from the program, which may change all of it: it can then only answer something else.
"""

import builtins
import contextlib
import copy
import importlib
import inspect
import io
import marshal
import math
import operator
import os
import socket
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sandbox.channel import Channel, Closed
from sandbox.codec import CHANGEABLE, CONTAINERS, PLAIN
from sandbox.remote import ACTIONS, OPERATORS, READINGS

FILENAME = "<program>"


def run_program(end: socket.socket, payload: bytes, directory: str) -> None:
    """Run the program when its judge says so, and serve the judge until it has gone. `payload`: the program, and the
    imports of its check, which it may use as it could in one text."""
    program, imports = marshal.loads(payload)
    channel = Runner(end, program, imports)
    end.sendall(directory.encode())  # it tells the judge which process this is, too
    with contextlib.suppress(Closed):
        channel.serve()


class Runner(Channel):
    def __init__(self, end: socket.socket, program: str, imports: list[str]):
        super().__init__(end)
        self.program, self.imports, self.pid = program, imports, os.getpid()
        self.lock = threading.RLock()
        self.module = types.ModuleType("program")
        sys.modules["program"] = sys.modules["__main__"] = self.module
        self.names = self.module.__dict__
        own = (self.run, self.display, self.make, self.seed)
        self.operations = _OPERATIONS | {f.__name__: f for f in own}
        self.operations |= {"name": self.names.__getitem__, "set name": self.names.__setitem__}

    def run(self) -> None:
        text = self.program + "\n\n"  # it may end in a backslash
        exec(compile(text, FILENAME, "exec", dont_inherit=True), self.names)
        found: dict[str, Any] = {}
        for line in self.imports:
            with contextlib.suppress(Exception):  # the check will report the error
                exec(line, found)
        for name in found.keys() - self.names.keys():
            self.names[name] = found[name]

    def make(self, kind: type, *arguments: Any, **keywords: Any) -> Any:
        """Make an object for the check, which stays here even if it is of a class that derives from a plain one."""
        value = kind(*arguments, **keywords)
        if type(value) not in PLAIN and isinstance(value, CHANGEABLE) and id(value) not in self.numbers:
            self.describe(value)
        return value

    def seed(self, module: str, *arguments: Any, **keywords: Any) -> None:
        """Seed a module of random numbers, if the program has it."""
        if module.partition(".")[0] in sys.modules:
            importlib.import_module(module).seed(*arguments, **keywords)

    def display(self, source: str) -> tuple[str, str | None]:
        """Run a line as the interactive interpreter does. Returns what it printed, and the exception's last lines."""
        printed, error = io.StringIO(), None
        sys.displayhook = sys.__displayhook__
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(source, "<doctest>", "single", dont_inherit=True), self.names)
            except BaseException as raised:
                if isinstance(raised, KeyboardInterrupt):
                    raise
                error = "".join(traceback.format_exception_only(type(raised), raised))
        return printed.getvalue(), error

    def perform(self, operation: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        try:
            return self.operations[operation](*arguments, **keywords)
        finally:
            if os.getpid() != self.pid:  # a process that the program forked has come back to here
                os._exit(0)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()

    def describe(self, value: Any) -> list:
        if isinstance(value, types.CoroutineType):
            kind = "coroutine"
        elif hasattr(type(value), "__next__"):
            kind = "iterator"
        else:
            kind = "callable" if callable(value) else "object"
            kind = next((name for name, base in CONTAINERS.items() if isinstance(value, base)), kind)
        base = next((base for base in (int, float, str, bytes) if isinstance(value, base)), None)
        data = None if base is None else self._encoder().encode(_PLAIN[base](value))
        return self.lend(value, type(value).__name__, kind, data)

    def stand_in(self, number: int, kind: str, name: str, doc: str | None, parameters: list | None) -> Any:
        """What the program gets for an iterator or a function of the check: the latter is one, and becomes a method."""
        if kind == "iterator":
            return _Iterator(self)

        def function(*arguments: Any, **keywords: Any) -> Any:
            with self.lock:  # threads of the program may call it
                return self.ask("call", function, *arguments, **keywords)

        function.__name__ = function.__qualname__ = name
        function.__doc__ = doc
        if parameters is not None:
            default = [inspect.Parameter.empty, ...]
            found = [inspect.Parameter(n, kind, default=default[has_default]) for n, kind, has_default in parameters]
            function.__signature__ = inspect.Signature(found)
        return function

    def line_of(self, error: BaseException) -> int | None:
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == FILENAME else None
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == FILENAME:
                line = trace.tb_lineno
            trace = trace.tb_next
        return line


# The plain value of one of a derived type, whatever methods that has.
_PLAIN = {int: int.__index__, float: float.__float__, str: str.__str__, bytes: lambda value: bytes.join(b"", [value])}
# What an object of such a type holds.
_HELD: dict[type, Callable[[Any], Any]] = {
    list: lambda value: [*list.__iter__(value)],
    dict: lambda value: dict(zip(dict.keys(value), dict.values(value), strict=True)),
    set: lambda value: {*set.__iter__(value)},
    deque: lambda value: deque(deque.__iter__(value)),
}


class _Iterator:
    """An iterator of the check."""

    def __init__(self, channel: Channel):
        self._channel = channel

    def __iter__(self) -> "_Iterator":
        return self

    def __next__(self) -> Any:
        return self._channel.ask("next", self)


def _await(coroutine: types.CoroutineType) -> Any:
    import asyncio  # a tenth of a second

    return asyncio.run(coroutine)


# What a check can do with an object of the program. Those not here are functions of Python's or of `operator`.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **keywords: function(*arguments, **keywords),
    "call method": lambda value, name, *arguments, **keywords: getattr(value, name)(*arguments, **keywords),
    "await": _await,
    "enter": lambda manager: type(manager).__enter__(manager),
    "send": lambda iterator, value: iterator.send(value),
    "throw": lambda iterator, kind, *arguments: iterator.throw(kind(*arguments)),
    "exit": lambda manager, kind, error: type(manager).__exit__(manager, kind, kind and kind(*error), None),
    "instancecheck": lambda kind, value: isinstance(value, kind),
    "subclasscheck": lambda kind, other: issubclass(other, kind),
    "deepcopy": copy.deepcopy,
    "plain": lambda value: next(_HELD[base](value) for base in _HELD if isinstance(value, base)),
    "items": lambda value: [*value] if hasattr(type(value), "__len__") and not hasattr(value, "keys") else None,
    "copy": copy.copy,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "and": operator.and_,
    "or": operator.or_,
}
for _name in ("getattr", "getitem", "iter", "len", "next", *ACTIONS, *READINGS, *OPERATORS):
    _OPERATIONS.setdefault(_name, getattr(builtins, _name, None) or getattr(operator, _name, None))
