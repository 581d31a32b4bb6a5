"""Random changes of files: of any bytes, of JSON values, and of protobuf messages."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

EntryPath = tuple[str | int, ...]
NUMBERS = (True, -1, 0, 1, 7, 2**31, 2**63, 10**30, -0.5, 1e308, float("inf"), float("nan"))
TEXTS = ("", "x", "../x", "denoiser.onnx", "\x1b[2J", "\ud800", "a\nb", "x" * 5000, "é", "None")
VALUES: tuple[Any, ...] = (*NUMBERS, *TEXTS, None, [], [1], [[]], {}, {"x": 1}, [None], ["x"])


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, zero, repeat, insert or move some bytes."""
    if not data:
        return b"\0"
    at, size = rng.randrange(len(data)), rng.choice((1, 4, 64, 1024))
    match rng.randrange(7):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
        case 3:
            return data[:at] + data[at : at + size] * 2 + data[at + size :]
        case 4:
            return data[:at] + rng.randbytes(size) + data[at:]
        case 5:
            return data[:at] + data[at + size :]
        case _:
            return data[:at] + rng.choice((b"\xff", b"\x7f", b"\x80", b"\0")) * min(size, 8) + data[at + min(size, 8) :]


def entry_paths(value: Any, path: EntryPath = ()) -> Iterator[EntryPath]:
    """Yield the path of every entry of a JSON value; of long lists and objects only the first few."""
    entries = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in entries[:40]:
        yield (*path, key)
        yield from entry_paths(inner, (*path, key))


def changed_json(value: Any, rng: random.Random) -> Any:
    """Remove, replace, rename, add or swap entries of a JSON value; returns a changed copy."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = list(entry_paths(value))
        if not paths:
            return rng.choice(VALUES)
        *parents, last = rng.choice(paths)
        inner = _at(value, parents)
        match rng.randrange(6):
            case 0:
                del inner[last]
            case 1 | 2:
                inner[last] = rng.choice(VALUES)
            case 3 if isinstance(inner, dict):
                inner[f"{last}x"] = inner.pop(last)
            case 4 if isinstance(inner, dict):
                inner[rng.choice(("x", "format", "version", "_class_name", "../x"))] = rng.choice(VALUES)
            case _:
                inner[last] = json.loads(json.dumps(_at(value, list(rng.choice(paths)))))
    return value


def _at(value: Any, path: list[str | int]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed_message(message: Any, rng: random.Random) -> None:
    """Change a field of a protobuf message, or of one inside it."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        _change_field(message, rng)


def _change_field(message: Any, rng: random.Random) -> None:
    fields = message.ListFields()
    if not fields:
        return
    field, value = rng.choice(fields)
    if field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED:
        at = rng.randrange(len(value))
        action = rng.randrange(4)
        if action == 0:
            del value[at]
        elif field.message_type is not None:
            if action == 1:
                value.add().CopyFrom(value[at])
            else:
                _change_field(value[at], rng)
        else:
            value[at] = _scalar(field, value[at], rng)
    elif field.message_type is not None:
        if rng.random() < 0.1:
            message.ClearField(field.name)
        else:
            _change_field(value, rng)
    else:
        setattr(message, field.name, _scalar(field, value, rng))


def _scalar(field: Any, value: Any, rng: random.Random) -> Any:
    """Return another value of a scalar field's type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        if field.enum_type is not None:
            return rng.choice([entry.number for entry in field.enum_type.values])
        small = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32)
        numbers = (0, 1, 2, 3, 7, 2**31 - 1, *([] if small else [2**40, 2**62, -1, -(2**63)]))
        return rng.choice(numbers)
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, 1e38, float("inf"), float("nan")))
    if isinstance(value, bytes):
        return changed_bytes(value, rng)
    return rng.choice(("", "x", "Relu", "Conv", "Reshape", f"{value}x", "../x", "sample"))
