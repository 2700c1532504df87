"""Values cross as they are, and nothing else crosses. The modules are flat, as in the fork server."""

import dataclasses
import enum
import json
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

import pytest

from sandbox.codec import Decoder, Encoder

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    name: str
    items: list


class Level(enum.IntEnum):
    HIGH = 3


class Lying(list):
    def __iter__(self):
        return iter("lies")

    def __eq__(self, other):
        return True


def refuse(value):
    raise TypeError(f"not plain: {value!r}")


def sent(value):
    """What the other side gets, which knows none of this side's classes."""
    text = json.dumps(Encoder(refuse, {}).encode(value))
    return Decoder(refuse, {}).decode(json.loads(text))


PLAIN = [
    None, True, 7, -(2**70), 10**5000, 1.5, float("inf"), -0.0, 1 + 2j, "x\ud800", b"\xff", bytearray(b"1"),
    range(1, 9, 2), slice(1, None), ..., [1, [2, "3"]], (1, (2,)), {1, 2}, frozenset({(1, 2)}),
    {1: {"a": []}, (1, 2): 3}, {1: 2}.keys(), Decimal("1.20"), Fraction(1, 3),
    datetime(2020, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc), date(2020, 1, 1), time(1, 2, 3), timedelta(1, 2, 3),
    deque([1, 2], 3), Counter("abca"), OrderedDict([(2, 1), (1, 2)]), defaultdict(list, {1: [2]}), int,
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_data_arrive_with_value_type_and_order(value):
    result = sent(value)
    assert type(result) is type(value) and result == value
    assert isinstance(value, int) or repr(result) == repr(value)


def test_records_arrive_as_data_of_a_class_of_the_receivers_own():
    pair, record = sent(Pair(1, [2])), sent(Record("a", [1]))
    assert pair == (1, [2]) and pair.y == [2] and type(pair).__name__ == "Pair" and type(pair) is not Pair
    assert (record.name, record.items) == ("a", [1]) and type(record) is not Record
    assert sent(Lying([1, 2])) == [1, 2] and sent(Lying([1, 2])) != [1]


def test_what_is_shared_or_holds_itself_keeps_its_shape():
    part = [1]
    whole = [part, part]
    whole.append(whole)
    result = sent(whole)
    assert result[0] is result[1] and result[2] is result and result[0] == [1]


def test_arrays_arrive_with_shape_and_type():
    numpy = pytest.importorskip("numpy")
    values = [numpy.arange(6).reshape(2, 3), numpy.array(["ab", "c"]), numpy.array([]), numpy.zeros((0, 3), numpy.int8)]
    values += [numpy.array([1, [2], None], dtype=object), numpy.array("2020-01-01", dtype="M8[D]")]
    for value in values:
        result = sent(value)
        assert result.dtype == value.dtype and result.shape == value.shape and result.tolist() == value.tolist()
    assert type(sent(numpy.float64(1.5))) is numpy.float64 and type(sent(numpy.bool_(True))) is numpy.bool_


def test_what_is_too_deep_or_too_large_is_refused(monkeypatch):
    monkeypatch.setattr("sandbox.codec.MAX_PARTS", 10_000)
    deep, wide = [], ()
    for _ in range(99):
        deep = [deep]
    assert sent(deep) == deep
    for _ in range(40):
        wide = (wide, wide)  # 2**40 parts in 40 objects
    for value in ([[deep]], wide):
        with pytest.raises(ValueError, match="to send"):
            sent(value)
    for value in (object(), print, refuse, json, Level.HIGH):
        with pytest.raises(TypeError, match="not plain"):
            sent(value)


@pytest.mark.parametrize(
    "data",
    [
        ["nosuch", 1], ["same", 0], ["same", -1], ["same", "x"], ["type", "open"], ["type", "Exception"],
        ["int", 5], ["list", {"a": 1}], ["list"], ["dict", [1], []], ["dict", [["list", []]], [1]],
        ["named", "X", ["__init__ = 1"], [1]], ["named", "X", ["a", "b"], [1]],
        ["data", "X; import os", ["a"], [1, 0, 0], [1]], ["data", "X", ["a"], [1, 0, 0], []],
        ["array", "O8", [1], "AAAA"], ["array", "V4,O", [1], "AAAA"], ["array", "<i8", [2], "AAAA"],
        ["scalar", "|O", "AAAA"], ["decimal", "x"], ["fraction", 1, 0], ["bytes", 5], ["range", [1, 2, 3, 4]],
        [["list"], 1], [], ["set", [["list", []]]],
    ],
)  # fmt: skip
def test_what_no_encoder_makes_is_refused(data):
    with pytest.raises((ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError)):
        Decoder(refuse, {}).decode(data)


def test_an_answer_tells_what_became_of_the_arguments():
    inner = [3]
    before = {"list": [2, inner], "set": {1}, "deque": deque([1]), "bytes": bytearray(b"a"), "record": Record("a", [])}
    there = Encoder(refuse, {})
    arguments = json.loads(json.dumps(there.encode(before)))
    decoder = Decoder(refuse, {})
    received = decoder.decode(arguments)
    received["list"].reverse()
    received["list"][0].append(received["set"])
    received["set"].add(2)
    received["deque"].append(2)
    received["bytes"] += b"b"
    received["record"].name = "b"
    received["new"] = received["list"][0]
    back = Encoder(refuse, {}, decoder.objects)
    contents = [back.contents(value) for value in decoder.objects]
    receiver = Decoder(refuse, {}, there.objects)
    for value, data in zip(there.objects, json.loads(json.dumps(contents)), strict=True):
        receiver.renew(value, data)
    assert before["list"] == [[3, {1, 2}], 2] and before["list"][0] is inner is before["new"]
    assert (before["deque"], before["bytes"], before["record"].name) == (deque([1, 2]), b"ab", "b")
