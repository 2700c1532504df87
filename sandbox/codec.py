"""Plain data as JSON, so that a judge and a program can send them to each other.

The receiver builds exactly the types named here, out of the sender's text, and runs no code of the sender, as pickle
would. None, bool, str, float and ints of 64 bits are JSON's own. Everything else is a list that begins with a tag.
Objects that can change are numbered in the order in which they come, and the second time only the number is sent. So
cycles and shared parts keep their shape, and an answer can say what a call did to its arguments (`contents`, `renew`).

What is no plain data is left to two functions of the caller, `refer` and `resolve` (channel.py).
"""

import base64
import builtins
import dataclasses
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Collection, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any
from uuid import UUID

MAX_DEPTH = 100
MAX_PARTS = 4_000_000  # of one message, because one object of a few parts can hold itself many times
JSON_INT = 2**63  # other ints are sent in hexadecimal, which has no limit of digits
SCALARS = {NoneType, bool, str, float}
TYPES = {
    kind.__name__: kind
    for kind in (
        object, NoneType, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range,
        type, Decimal, Fraction, Counter, OrderedDict, defaultdict, deque, date, datetime, time, timedelta,
    )
}  # fmt: skip
EXCEPTIONS = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException) and value.__name__ == name
}
CONTAINERS = {"list": list, "dict": dict, "set": set, "deque": deque}
CHANGEABLE = (list, dict, set, bytearray, deque)
NUMPY_TYPE = re.compile(r"[<>|=][?biufcSUMm]\d*(\[\d*\w+\])?")


class Encoder:
    """Encodes the values of one message. `objects` are those that were numbered by the message that it answers."""

    def __init__(
        self,
        refer: Callable[[Any], Any],
        records: dict[tuple, type],
        objects: Sequence[Any] = (),
        referred: Collection[int] = (),  # ids of objects of derived types that `refer` knows already
    ):
        self.refer, self.records, self.referred = refer, records, referred
        self.objects = list(objects)  # by number; this also keeps their ids valid
        self.numbers = {id(value): number for number, value in enumerate(self.objects)}
        self.parts_left = MAX_PARTS

    def encode(self, value: Any, depth: int = 0) -> Any:
        """Returns `value` as JSON data. Raises ValueError if it is too deep or too large, or what `refer` raises."""
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is int:
            return value if -JSON_INT <= value < JSON_INT else ["int", hex(value)]
        number = self.numbers.get(id(value))
        if number is not None:
            return ["same", number]
        self.parts_left -= 1
        if depth > MAX_DEPTH or self.parts_left < 0:
            raise ValueError("too deep to send" if depth > MAX_DEPTH else "too large to send")
        write = _WRITERS.get(kind) or self._writer_of_other(value)
        if write is not None and (isinstance(value, CHANGEABLE) or write in (_write_array, _write_data)):
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.refer(value) if write is None else write(self, value, depth + 1)

    def contents(self, value: Any) -> Any:
        """What an object that was numbered holds now, as JSON data for `renew`."""
        write = _WRITERS.get(type(value)) or self._writer_of_other(value)
        return write(self, value, 0)

    def items(self, values: Any, depth: int) -> list[Any]:
        values = list(values)
        self.parts_left -= len(values)
        kinds = {*map(type, values)}
        if kinds <= SCALARS or (kinds == {int} and min(values) >= -JSON_INT and max(values) < JSON_INT):
            return values
        return [self.encode(value, depth) for value in values]

    def _writer_of_other(self, value: Any) -> "Writer | None":
        """The writer of a value of another type: of an array, of a record, or of the type from which it derives."""
        if isinstance(value, type):
            return _write_type if TYPES.get(value.__name__) is value else None
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
            known = NUMPY_TYPE.fullmatch(value.dtype.str) or value.dtype == object
            return (_write_array if isinstance(value, numpy.ndarray) else _write_scalar) if known else None
        if isinstance(value, tuple) and isinstance(getattr(value, "_fields", None), tuple):
            return _write_named
        if dataclasses.is_dataclass(value):
            return _write_data
        if id(value) in self.referred or isinstance(value, (int, float, str, bytes)):
            return None
        return next((_WRITERS[base] for base in type(value).__mro__ if base in _WRITERS), None)


Writer = Callable[[Encoder, Any, int], Any]


def _write_pairs(tag: str, kind: type) -> Writer:
    return lambda e, value, depth: [tag, e.items(kind.keys(value), depth), e.items(kind.values(value), depth)]


def _write_type(e: Encoder, value: Any, depth: int) -> Any:
    return ["type", value.__name__]


def _write_named(e: Encoder, value: Any, depth: int) -> Any:
    key = ("named", type(value).__name__, tuple(map(str, value._fields)))
    e.records.setdefault(key, type(value))
    return ["named", *key[1:], e.items(tuple.__iter__(value), depth)]


def _write_data(e: Encoder, value: Any, depth: int) -> Any:
    names = tuple(field.name for field in dataclasses.fields(value))
    options = getattr(type(value), "__dataclass_params__", None)
    flags = [bool(getattr(options, flag, False)) for flag in ("eq", "order", "frozen")]
    e.records.setdefault(("data", type(value).__name__, names), type(value))
    return ["data", type(value).__name__, names, flags, e.items([getattr(value, name) for name in names], depth)]


def _write_array(e: Encoder, value: Any, depth: int) -> Any:
    if value.dtype == object:
        return ["array", "O", value.shape, e.items(value.ravel().tolist(), depth)]
    return ["array", value.dtype.str, value.shape, _text(value.tobytes())]


def _write_scalar(e: Encoder, value: Any, depth: int) -> Any:
    if value.dtype.kind in "SU":  # an array of these drops zeros at the end
        return ["scalar", value.dtype.kind, _text(value) if value.dtype.kind == "S" else str.__str__(value)]
    return ["scalar", value.dtype.str, _text(value.tobytes())]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# A writer takes the part that makes the type what it is with the base type's own methods, whatever a derived class has.
_WRITERS: dict[type, Writer] = {
    complex: lambda e, v, d: ["complex", v.real, v.imag],
    bytes: lambda e, v, d: ["bytes", _text(v)],
    bytearray: lambda e, v, d: ["bytearray", _text(v)],
    range: lambda e, v, d: ["range", e.items((v.start, v.stop, v.step), d)],
    slice: lambda e, v, d: ["slice", e.items((v.start, v.stop, v.step), d)],
    type(...): lambda e, v, d: ["ellipsis"],
    list: lambda e, v, d: ["list", e.items(list.__iter__(v), d)],
    tuple: lambda e, v, d: ["tuple", e.items(tuple.__iter__(v), d)],
    set: lambda e, v, d: ["set", e.items(set.__iter__(v), d)],
    frozenset: lambda e, v, d: ["frozenset", e.items(frozenset.__iter__(v), d)],
    dict: _write_pairs("dict", dict),
    OrderedDict: _write_pairs("ordered", OrderedDict),
    Counter: _write_pairs("counter", dict),
    defaultdict: lambda e, v, d: [*_write_pairs("default", dict)(e, v, d), e.encode(v.default_factory, d)],
    deque: lambda e, v, d: ["deque", e.items(deque.__iter__(v), d), v.maxlen],
    type({}.keys()): lambda e, v, d: ["keys", e.items(v, d)],
    Decimal: lambda e, v, d: ["decimal", Decimal.__str__(v)],
    Fraction: lambda e, v, d: ["fraction", e.encode(v.numerator, d), e.encode(v.denominator, d)],
    datetime: lambda e, v, d: ["datetime", datetime.isoformat(v), v.fold],
    date: lambda e, v, d: ["date", date.isoformat(v)],
    time: lambda e, v, d: ["time", time.isoformat(v), v.fold],
    timedelta: lambda e, v, d: ["timedelta", v.days, v.seconds, v.microseconds],
    type(Path()): lambda e, v, d: ["path", str(v)],
    UUID: lambda e, v, d: ["uuid", v.hex],
}


PLAIN = {*_WRITERS, *SCALARS, int}  # types whose values are sent as they are


class Decoder:
    """Decodes the values of one message. `objects` are those that were numbered by the message that it answers."""

    def __init__(
        self,
        resolve: Callable[[list], Any],
        records: dict[tuple, type],
        objects: Sequence[Any] = (),
        methods: dict[str, Any] | None = None,  # of the classes that are made for records
    ):
        self.resolve, self.records, self.objects, self.methods = resolve, records, list(objects), methods or {}

    def decode(self, data: Any) -> Any:
        """Raises ValueError, TypeError, IndexError or OverflowError if `data` is not what an Encoder makes."""
        if not isinstance(data, list):
            return data
        read = _READERS.get(data[0])
        return self.resolve(data) if read is None else read(self, *data[1:])

    def items(self, data: list[Any]) -> list[Any]:
        if not isinstance(data, list):
            raise ValueError("not from an encoder")
        return [value if type(value) is not list else self.decode(value) for value in data]

    def begin(self, value: Any) -> Any:
        """Number a new object, before its contents, which may contain it."""
        self.objects.append(value)
        return value

    def fill(self, value: Any, data: Any) -> Any:
        (value.update if isinstance(value, set) else value.extend)(self.items(data))
        return value

    def fill_pairs(self, value: Any, keys: Any, values: Any) -> Any:
        for key, item in zip(self.items(keys), self.items(values), strict=True):
            value[key] = item
        return value

    def renew(self, value: Any, data: Any) -> None:
        """Give `value`, an object of an earlier message, the contents that it has at the sender's now."""
        rest = data[1:]
        if isinstance(value, dict):
            value.clear()
            self.fill_pairs(value, *rest[:2])
        elif isinstance(value, (list, set, deque)):
            value.clear()
            self.fill(value, rest[0])
        elif isinstance(value, bytearray):
            value[:] = base64.b64decode(rest[0])
        elif dataclasses.is_dataclass(value):
            _set_fields(value, self.items(rest[-1]))
        elif rest[0] == "O":
            for place, item in zip(range(value.size), self.items(rest[2]), strict=True):
                value.flat[place] = item
        else:
            value[...] = Decoder(self.resolve, self.records).array(*rest)

    def same(self, number: int) -> Any:
        if not isinstance(number, int) or number < 0:
            raise ValueError("not from an encoder")
        return self.objects[number]

    def default(self, keys: Any, values: Any, factory: Any) -> Any:
        value = self.begin(defaultdict())
        self.fill_pairs(value, keys, values)
        factory = self.decode(factory)
        value.default_factory = factory if callable(factory) else None
        return value

    def named(self, name: str, fields: list[str], items: Any) -> Any:
        kind = self.record(
            ("named", name, tuple(fields)),
            lambda: type(name, (namedtuple(name, fields, rename=True),), {"__slots__": (), **self.methods}),
        )
        return tuple.__new__(kind, _of_length(self.items(items), len(fields)))

    def data(self, name: str, fields: list[str], flags: list[bool], items: Any) -> Any:
        eq, order, frozen = flags
        kind = self.record(
            ("data", name, tuple(fields)),
            lambda: dataclasses.make_dataclass(
                name, fields, namespace=dict(self.methods), eq=eq, order=order and eq, frozen=frozen
            ),
        )
        value = self.begin(object.__new__(kind))
        _set_fields(value, self.items(items))
        return value

    def record(self, key: tuple, make: Callable[[], type]) -> type:
        """The class that a named tuple or a dataclass has here; the sender's own is never sent."""
        if not all(
            name.isidentifier() and not name.startswith("__") and len(name) < 1000 for name in (key[1], *key[2])
        ):
            raise ValueError("not from an encoder")
        if key not in self.records:
            self.records[key] = make()
        return self.records[key]

    def array(self, dtype: str, shape: list[int], data: Any) -> Any:
        import numpy

        if dtype == "O":
            value = self.begin(numpy.empty(shape, object))
            value.reshape(-1)[:] = self.items(data)
            return value
        return self.begin(numpy.ndarray(shape, _numpy_type(dtype), bytearray(base64.b64decode(data))))

    def scalar(self, dtype: str, data: str) -> Any:
        import numpy

        if dtype in ("S", "U"):
            return numpy.bytes_(base64.b64decode(data)) if dtype == "S" else numpy.str_(data)
        return numpy.ndarray((), _numpy_type(dtype), base64.b64decode(data))[()]


def _set_fields(value: Any, items: list[Any]) -> None:
    for field, item in zip(dataclasses.fields(value), items, strict=True):
        object.__setattr__(value, field.name, item)


def _of_length(items: list[Any], length: int) -> list[Any]:
    if len(items) != length:
        raise ValueError("not from an encoder")
    return items


def _numpy_type(name: str) -> str:
    if not NUMPY_TYPE.fullmatch(name):
        raise ValueError("not from an encoder")
    return name


_READERS: dict[str, Callable[..., Any]] = {
    "same": Decoder.same,
    "int": lambda d, text: int(text, 16),
    "complex": lambda d, real, imag: complex(real, imag),
    "bytes": lambda d, text: base64.b64decode(text),
    "bytearray": lambda d, text: d.begin(bytearray(base64.b64decode(text))),
    "range": lambda d, items: range(*d.items(items)),
    "slice": lambda d, items: slice(*d.items(items)),
    "ellipsis": lambda d: ...,
    "list": lambda d, items: d.fill(d.begin([]), items),
    "tuple": lambda d, items: tuple(d.items(items)),
    "set": lambda d, items: d.fill(d.begin(set()), items),
    "frozenset": lambda d, items: frozenset(d.items(items)),
    "dict": lambda d, keys, values: d.fill_pairs(d.begin({}), keys, values),
    "ordered": lambda d, keys, values: d.fill_pairs(d.begin(OrderedDict()), keys, values),
    "counter": lambda d, keys, values: d.fill_pairs(d.begin(Counter()), keys, values),
    "default": Decoder.default,
    "deque": lambda d, items, maxlen: d.fill(d.begin(deque(maxlen=maxlen)), items),
    "keys": lambda d, items: dict.fromkeys(d.items(items)).keys(),
    "decimal": lambda d, text: Decimal(text),
    "fraction": lambda d, above, below: Fraction(d.decode(above), d.decode(below)),
    "datetime": lambda d, text, fold: datetime.fromisoformat(text).replace(fold=fold),
    "date": lambda d, text: date.fromisoformat(text),
    "time": lambda d, text, fold: time.fromisoformat(text).replace(fold=fold),
    "timedelta": lambda d, days, seconds, microseconds: timedelta(days, seconds, microseconds),
    "path": lambda d, text: Path(text),
    "uuid": lambda d, text: UUID(text),
    "type": lambda d, name: TYPES[name],
    "named": Decoder.named,
    "data": Decoder.data,
    "array": Decoder.array,
    "scalar": Decoder.scalar,
}
