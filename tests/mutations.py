"""Inputs changed at random, and readers that must read them or refuse them in one line, soon."""

import copy
import itertools
import json
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from biomamba_jax.errors import UserError

SOON = 5.0
"""Seconds in which a small input is read or refused, on a busy machine."""


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


NASTY = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, float("inf"), float("nan")),
    *("", "a", "x" * 5000, "../../etc/passwd", "/etc/passwd", "\ud83d", "\x00", "\u2028", "{0.__class__}", "1e999"),
    *([], {}, [[]], {"": {}}, [None], ["a", 1], {"a": [1]}, nested(50), nested(251), [0] * 3000),
]
TOKENS = [b"[" * 300, *rb'{ } " \ud83d \x00 null 1e999 - &a *a !! :'.split(b" "), b"\x00", b"\xff\xfe", b": ", b"\n"]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(each)


def mutated_json(value: Any, draw: random.Random) -> Any:
    """A few values replaced, removed, renamed, doubled or moved."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 2, 4])):
        found = list(places(value))
        if not found:
            return draw.choice(NASTY)
        (inside, key), (other, name) = draw.choice(found), draw.choice(found)
        match draw.randrange(6):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[draw.choice(["", "a", "../a", f"{key}s", "x" * 300])] = inside.pop(key)
            case 2 if isinstance(inside, list):
                inside.insert(0, copy.deepcopy(inside[key]))
            case 3:
                inside[key] = copy.deepcopy(other[name])
            case _:
                inside[key] = copy.deepcopy(draw.choice(NASTY))
    return draw.choice(NASTY) if draw.random() < 0.01 else value


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """A few places flipped, overwritten, cut out or doubled."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        start = draw.randrange(len(data) + 1)
        end = min(start + draw.choice([0, 1, 1, 8, 200]), len(data))
        flipped = bytes(byte ^ 1 << draw.randrange(8) for byte in data[start:end])
        middle = draw.choice([b"", draw.choice(TOKENS), data[start:end] * 2, flipped])
        data = data[:start] + middle + data[end:]
    return data


def mutated_file(whole: bytes, draw: random.Random) -> bytes:
    """JSON, JSON lines or a safetensors file with another header, or any file with other bytes."""
    if draw.random() < 0.3:
        return mutated_bytes(whole, draw)
    if whole[8:9] == b"{":
        (size,) = struct.unpack("<Q", whole[:8])
        header = json.dumps(mutated_json(json.loads(whole[8 : 8 + size]), draw)).encode()
        return struct.pack("<Q", draw.choice([len(header)] * 9 + [2**63])) + header + whole[8 + size :]
    try:
        return json.dumps(mutated_json(json.loads(whole), draw)).encode()
    except ValueError:
        lines = whole.splitlines()
    try:
        number = draw.randrange(len(lines))
        lines[number] = json.dumps(mutated_json(json.loads(lines[number]), draw)).encode()
        return b"\n".join(lines)
    except ValueError:
        return mutated_bytes(whole, draw)


def hammer(check: Callable[[int], None], examples: int, seconds: float) -> None:
    """Call `check` with `examples` seeds, and with as many others until the time is over."""
    end = time.monotonic() + seconds
    for number in itertools.count():
        settings = hypothesis.settings(max_examples=examples, database=None, derandomize=False)
        hypothesis.seed(number)(settings(hypothesis.given(st.integers(0, 2**64))(check)))()
        if time.monotonic() >= end:
            return


def read_or_refused(read: Callable[[], Any], names: Path | None = None) -> str:
    """Return what became of an input; checks that it came soon and in one line."""
    begun = time.monotonic()
    try:
        read()
        outcome = "read"
    except UserError as error:
        outcome = "refused"
        assert names is None or str(names) in str(error), str(error)[:500]
        assert len(str(error)) < 20_000
    assert time.monotonic() - begun < SOON
    return outcome


def some_or_many(shares: int) -> pytest.MarkDecorator:
    """Some examples, and for long tests as many as a share of ten minutes takes."""
    many = pytest.param(300, 600 / shares, id="many", marks=pytest.mark.long)
    return pytest.mark.parametrize(("examples", "seconds"), [pytest.param(10, 0, id="some"), many])
