"""What a check gets for objects of its program that are no plain data: the program does what the check asks of them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from sandbox.codec import CONTAINERS

# Attributes of functions, classes and objects that are no method of a protocol.
FORWARDED = (
    "__annotations__", "__closure__", "__code__", "__defaults__", "__dict__", "__func__", "__kwdefaults__",
    "__members__", "__name__", "__qualname__", "__self__", "__slots__", "__wrapped__",
)  # fmt: skip
ACTIONS = ("setattr", "delattr", "setitem", "delitem", "enter", "copy", "reversed")
READINGS = (
    "bool", "str", "repr", "format", "int", "float", "complex", "index", "round", "trunc", "floor", "ceil", "abs",
    "neg", "pos", "invert", "dir", "hash", "instancecheck", "subclasscheck",
)  # fmt: skip
OPERATORS = (
    "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift",
    "rshift", "and", "or", "xor",
)  # fmt: skip
MAX_ITEMS = 1_000_000  # of an iterator of the program


class Judge(Protocol):
    """What is needed of judge.Judge."""

    compared: bool

    def read(self, operation: str, *arguments: Any) -> Any: ...

    def act(self, operation: str, *arguments: Any, **keywords: Any) -> Any: ...

    def share(self, reason: str) -> BaseException: ...


def _act(operation: str) -> Callable[..., Any]:
    def method(self: "Remote", *arguments: Any) -> Any:
        return self._judge_.act(operation, self, *arguments)

    return method


def _read(operation: str) -> Callable[..., Any]:
    def method(self: "Remote", *arguments: Any) -> Any:
        return self._judge_.read(operation, self, *arguments)

    return method


def _between(operation: str) -> Callable[..., Any]:
    """An operator for two objects of the program. With any other it does not exist, because the program would choose
    the outcome, knowing what the check expects."""

    def method(self: "Remote", other: Any) -> Any:
        if not isinstance(other, Remote):
            return NotImplemented
        self._judge_.compared = True
        return self._judge_.read(operation, self, other)

    return method


def attribute_of(judge: Judge) -> Callable[[Any, str], Any]:
    """The `__getattr__` of what stands for an object of the program. Names of protocols are not looked up there:
    numpy's would let the program read the judge's memory, or choose the outcome of a comparison."""

    def get(self: Any, name: str) -> Any:
        if name.startswith("__") and name not in FORWARDED:
            raise AttributeError(name)
        return judge.read("getattr", self, name)

    return get


class Remote:
    """An object of the program. What the check does with it, the program does, except to compare it with plain data."""

    __slots__ = ("__weakref__", "_judge_")

    def __init__(self, judge: Judge):
        object.__setattr__(self, "_judge_", judge)

    def __getattr__(self, name: str) -> Any:
        return attribute_of(self._judge_)(self, name)

    def __deepcopy__(self, memo: dict) -> Any:
        return self._judge_.act("deepcopy", self)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> Any:
        return self._judge_.act("exit", self, kind, error and error.args)

    def __mro_entries__(self, bases: tuple) -> tuple:
        raise self._judge_.share("the check derives a class from one of the program")

    def __iter__(self) -> Iterator[Any]:
        items = self._judge_.read("items", self)
        return iter(items) if items is not None else self._judge_.act("iter", self)

    def __len__(self) -> int:
        items = self._judge_.read("items", self)
        return len(items) if items is not None else self._judge_.read("len", self)

    def __getitem__(self, key: Any) -> Any:
        items = self._judge_.read("items", self) if isinstance(key, (int, slice)) else None
        return items[key] if items is not None and isinstance(key, int) else self._judge_.read("getitem", self, key)


for _name in ACTIONS:
    setattr(Remote, f"__{_name}__", _act(_name))
for _name in READINGS:
    setattr(Remote, f"__{_name}__", _read(_name))
for _name in OPERATORS:
    setattr(Remote, f"__{_name}__", _between(_name))


class RemoteCallable(Remote):
    __slots__ = ("_operation_",)

    def __init__(self, judge: Judge):
        super().__init__(judge)
        object.__setattr__(self, "_operation_", "call")

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._judge_.act(self._operation_, self, *arguments, **keywords)


class RemoteContainer(Remote):
    """An object of a class that derives from list, dict and the like. The check compares what it holds."""

    __slots__ = ()
    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return self._plain_() == (other._plain_() if isinstance(other, RemoteContainer) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _plain_(self) -> Any:
        return self._judge_.read("plain", self)


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
        return self._judge_.act("next", self)

    def send(self, value: Any) -> Any:
        return self._judge_.act("send", self, value)

    def throw(self, kind: Any, *arguments: Any) -> Any:
        error = kind if isinstance(kind, BaseException) else kind(*arguments[:1])
        return self._judge_.act("throw", self, type(error), *error.args)


KINDS = {"object": Remote, "callable": RemoteCallable, "iterator": RemoteIterator, "coroutine": Remote}


@functools.lru_cache(256)
def remote_class(name: str, kind: str) -> type:
    """The class of what stands for objects of a class of the program called `name`, of one of KINDS or derived from a
    container of CONTAINERS."""
    doc = property(lambda remote: remote._judge_.read("getattr", remote, "__doc__"))
    own = {"__slots__": (), "__doc__": doc}
    if kind in KINDS:
        return type(name, (KINDS[kind],), own)
    base = CONTAINERS[kind]
    return type(name, (RemoteContainer,), own | {"__class__": property(lambda remote: base)})


async def awaited(remote: Remote) -> Any:
    return remote._judge_.act("await", remote)
