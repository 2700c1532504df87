"""The channel between a judge and a program: each asks the other to do something, and waits for the answer.

A message is a length and JSON text. A question names an operation and its arguments; the answer is what it returned or
raised, and what it did to the arguments. While one side waits for an answer, the other may ask in turn: so a program
calls a function that its check gave it. Objects that are no plain data stay where they are. The other side gets a
number for each, and sends it back to mean the object.
"""

import contextlib
import json
import marshal
import os
import re
import socket
import struct
from collections.abc import Sequence
from typing import Any

from sandbox.codec import EXCEPTIONS, Decoder, Encoder

MAX_BYTES = 2**26  # of a message
MAX_TEXT = 10_000  # characters of an exception's text


class Closed(BaseException):
    """The other side has gone, or sent what no channel sends. `Channel.fault` stays, even if a check catches this."""


class Channel:
    """One end. A subclass says what its side does when asked (`perform`), how it tells of an object that stays here
    (`describe`), and what stands here for one of the other side (`stand_in`)."""

    def __init__(self, end: socket.socket):
        self.end = end
        self.partner: int | None = None  # the process whose messages count, if `end` tells who sent them
        self.methods: dict[str, Any] = {}  # of the classes that are made here for records of the other side
        self.records: dict[tuple, type] = {}  # classes of named tuples and dataclasses
        self.lent: list[Any] = []  # by number: objects of this side that the other knows
        self.borrowed: dict[int, Any] = {}  # by number: what stands for objects of the other side
        self.numbers: dict[int, list] = {}  # how to tell the other side of an object in `lent` or `borrowed`, by its id
        self.received = bytearray()  # the beginning of the next message
        self.fault: str | None = None  # why the other side cannot be asked any more

    def perform(self, operation: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        raise NotImplementedError

    def describe(self, value: Any) -> list:
        raise NotImplementedError

    def stand_in(self, number: int, *description: Any) -> Any:
        raise NotImplementedError

    def ask(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        """Have the other side do `operation`. Returns its result, or raises its exception, or Closed."""
        if self.fault is not None:
            raise Closed
        encoder = self._encoder()
        values = [[encoder.encode(value) for value in part] for part in (arguments, keywords.values())]
        question = _pack([operation, values[0], [*keywords], values[1]])
        if self.received or self._receive_some(socket.MSG_DONTWAIT)[0]:
            raise self.close("answered before it was asked")
        self._send(question)
        while True:
            message = self._receive()
            try:
                if len(message) == 4:
                    question = message
                else:
                    kind, result, contents = message
                    decoder = self._decoder(encoder.objects)
                    for value, data in zip(encoder.objects, contents, strict=True):
                        if data is not None:
                            decoder.renew(value, data)
                    if kind == "return":
                        return decoder.decode(result)
                    error = self._read_exception(decoder, operation, *result)
                    question = None
            except Exception as wrong:
                raise self.close(f"sent what is no answer ({type(wrong).__name__})") from None
            if question is None:
                raise error
            self.answer(question)

    def answer(self, question: list) -> None:
        """Do what a question asks for, and send the answer."""
        try:
            operation, values, names, named_values = question
            decoder = self._decoder()
            arguments = [decoder.decode(value) for value in values]
            keywords = dict(zip(names, [decoder.decode(value) for value in named_values], strict=True))
        except Exception as wrong:
            raise self.close(f"asked what is no question ({type(wrong).__name__})") from None
        objects = list(decoder.objects)
        encoder = self._encoder(objects)
        before = [marshal.dumps(encoder.contents(value), 2) for value in objects]
        try:
            result = self.perform(operation, arguments, keywords)
            kind = "return"
        except Closed:
            raise
        except BaseException as error:
            result, kind = error, "raise"
        try:
            encoder = self._encoder(objects)
            contents = [encoder.contents(value) for value in objects]
            unchanged = [marshal.dumps(data, 2) == earlier for data, earlier in zip(contents, before, strict=True)]
            contents = [None if same else data for data, same in zip(contents, unchanged, strict=True)]
            result = encoder.encode(result) if kind == "return" else self._write_exception(encoder, result)
            answer = _pack([kind, result, contents])
        except Exception as error:  # too large, too deep, or its own methods raise
            answer = _pack(["raise", self._write_exception(self._encoder(), error), [None] * len(objects)])
        self._send(answer)

    def serve(self) -> None:
        """Answer until the other side has gone."""
        while True:
            self.answer(self._receive())

    def close(self, fault: str) -> Closed:
        self.fault = self.fault or fault
        return Closed()

    def lend(self, value: Any, *description: Any) -> list:
        """How to tell the other side of an object that stays here."""
        self.lent.append(value)
        self.numbers[id(value)] = ["own", len(self.lent) - 1, *description]
        return self.numbers[id(value)]

    def _encoder(self, objects: Sequence[Any] = ()) -> Encoder:
        return Encoder(self._refer, self.records, objects, self.numbers)

    def _decoder(self, objects: Sequence[Any] = ()) -> Decoder:
        return Decoder(self._resolve, self.records, objects, self.methods)

    def _refer(self, value: Any) -> list:
        if id(value) in self.numbers:
            return self.numbers[id(value)]
        if isinstance(value, type) and issubclass(value, BaseException):
            return self._write_exception_class(value)
        return self.describe(value)

    def _resolve(self, data: list) -> Any:
        kind, number, *description = data
        if kind == "yours" and number >= 0:
            return self.lent[number]
        if kind == "exception":
            return self._exception_class(*data[1:])
        if kind != "own" or not isinstance(number, int):
            raise ValueError("not from an encoder")
        return self._borrow(number, lambda: self.stand_in(number, *description))

    def _borrow(self, number: int, make: Any) -> Any:
        if number not in self.borrowed:
            self.borrowed[number] = value = make()
            self.numbers[id(value)] = ["yours", number]
        return self.borrowed[number]

    def _write_exception_class(self, kind: type) -> list:
        """A builtin class goes by its name; any other with its base, so that the other side can make one like it."""
        if id(kind) in self.numbers:
            return self.numbers[id(kind)]
        if EXCEPTIONS.get(kind.__name__) is kind:
            return ["exception", kind.__name__]
        bases = [self._write_exception_class(base) for base in kind.__bases__ if issubclass(base, BaseException)]
        self.lent.append(kind)
        self.numbers[id(kind)] = ["exception", len(self.lent) - 1, str(kind.__name__)[:80], bases]
        return self.numbers[id(kind)]

    def _exception_class(self, number: int | str, name: str = "", bases: list[list] | None = None) -> type:
        if bases is None:
            return EXCEPTIONS[number]
        kinds, name = tuple(map(self._resolve, bases)), re.sub(r"\W", "?", name[:80])
        if not kinds or not all(issubclass(kind, BaseException) for kind in kinds):
            raise ValueError("not from an encoder")
        own = {"__new__": _new, "__init__": _accept, "__str__": _text_of}
        return self._borrow(number, lambda: type(name, kinds, own))

    def _write_exception(self, encoder: Encoder, error: BaseException) -> list:
        """What the other side needs to raise an exception like this one."""
        arguments = attributes = None
        try:
            text = str(str(error)[:MAX_TEXT])
        except BaseException:
            text = ""
        if len(text) < MAX_TEXT:
            with contextlib.suppress(Exception):
                values = error.args
                if isinstance(error, OSError) and error.filename is not None:
                    values = (error.errno, error.strerror, error.filename)
                arguments, attributes = encoder.encode(values), encoder.encode(vars(error))
                _pack([arguments, attributes])
        return [self._write_exception_class(type(error)), arguments, attributes, text, self.line_of(error)]

    def line_of(self, error: BaseException) -> int | None:
        """The line of the program that raised it."""
        return None

    def _read_exception(
        self, decoder: Decoder, operation: str, kind: list, arguments: Any, attributes: Any, text: str, line: int | None
    ) -> BaseException:
        kind = decoder.decode(kind)
        name = kind.__name__
        if issubclass(kind, StopIteration) and operation not in ("next", "send", "throw"):
            kind = RuntimeError  # or a function that raises it would end the loop of a check that maps it
        try:
            error = kind(*(decoder.decode(arguments) if arguments is not None else (text,)))
        except (TypeError, ValueError):  # of a class that wants other arguments
            error = RuntimeError(text)
        for attribute, value in decoder.decode(attributes or ["dict", [], []]).items():
            if not attribute.startswith("__"):
                error.__dict__[attribute] = value
        error.__dict__["_remote_"] = (name, str(text)[:MAX_TEXT], line if isinstance(line, int) else None)
        return error

    def _send(self, message: bytes) -> None:
        try:
            self.end.sendall(message)
        except OSError:
            raise self.close("left") from None

    def _receive(self) -> list:
        (length,) = struct.unpack(">Q", self._receive_exactly(8))
        if length > MAX_BYTES:
            raise self.close("sent too long a message")
        data = self._receive_exactly(length)
        try:
            message = _from_json(data.decode())
            if isinstance(message, list) and len(message) in (3, 4):
                return message
        except (ValueError, RecursionError):
            pass
        raise self.close("sent what is no message")

    def _receive_exactly(self, size: int) -> bytes:
        while len(self.received) < size:
            piece, _ = self._receive_some(0)
            if not piece:
                raise self.close("left")
            self.received += piece
        data = bytes(self.received[:size])
        del self.received[:size]
        return data

    def _receive_some(self, flags: int) -> tuple[bytes, int | None]:
        """Returns what comes from the partner next, nothing if it has gone, and the process that sent it. What other
        processes send is dropped."""
        while True:
            try:
                piece, extra, _, _ = self.end.recvmsg(2**18, socket.CMSG_SPACE(12), flags)
            except OSError:
                return b"", None
            sender = sender_of(extra)
            if not piece or self.partner in (None, sender):
                return piece, sender


def sender_of(extra: list[tuple[int, int, bytes]]) -> int | None:
    """Returns the process that sent a message with this ancillary data; None if it does not tell."""
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, getattr(socket, "SCM_CREDENTIALS", None)):
            return struct.unpack("iII", data)[0]
    return None


def read_exactly(size: int) -> bytes:
    """Read `size` bytes of a request from standard input. Raises EOFError if they do not come."""
    pieces = []
    while size:
        piece = os.read(0, size)
        if not piece:
            raise EOFError
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _pack(message: Any) -> bytes:
    """Returns a message with its length before it. Raises ValueError if it is too long."""
    data = _to_json(message).encode()
    if len(data) > MAX_BYTES:
        raise ValueError(f"too large to send: {len(data)} bytes")
    return struct.pack(">Q", len(data)) + data


def _refuse(pairs: list) -> None:
    raise ValueError("not from an encoder")


_to_json = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode
_from_json = json.JSONDecoder(object_pairs_hook=_refuse).decode


def _new(kind: type, *arguments: Any, **keywords: Any) -> BaseException:
    return _builtin_base(kind).__new__(kind, *arguments)


def _accept(self: BaseException, *arguments: Any, **keywords: Any) -> None:
    """The constructor of an exception that stands for another: it takes any arguments."""
    with contextlib.suppress(TypeError, ValueError):
        _builtin_base(type(self)).__init__(self, *arguments)
    self.__dict__.update(keywords)


def _builtin_base(kind: type) -> type:
    return next(base for base in kind.__mro__ if EXCEPTIONS.get(base.__name__) is base)


def _text_of(self: BaseException) -> str:
    remote = self.__dict__.get("_remote_")
    return remote[1] if remote else BaseException.__str__(self)
