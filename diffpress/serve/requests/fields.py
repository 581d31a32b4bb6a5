"""Values of a request's JSON body, each of exactly one type: no number is read from a string, or from true and false.

Every function returns None for a value that is missing or null, and raises InvalidInputError naming the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from diffpress.runtime.errors import InvalidInputError, unknown_name

Body = Mapping[str, Any]

KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}

BRIEF = 60  # characters of a value in a message


def parsed(body: bytes) -> dict[str, Any]:
    """Parse a body; InvalidInputError if it is no JSON object with finite numbers."""
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise InvalidInputError("the body is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and integers of thousands of digits
        raise InvalidInputError(f"the body is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InvalidInputError(f"the body must be a JSON object, found {_kind(data)}")
    return data


def check_names(data: Body, known: Iterable[str]) -> None:
    """Raise InvalidInputError for a field that is not known."""
    names = list(known)
    for name in data:
        if name not in names:
            raise unknown_name("field", repr(name)[1:-1][:BRIEF], names)


def integer(data: Body, name: str, low: int, high: int) -> int | None:
    """Return an integer in low..high."""
    value = data.get(name)
    if value is None:
        return None
    return _integer(value, name, low, high)


def integers(data: Body, name: str, low: int, high: int, most: int) -> int | list[int] | None:
    """Return an integer in low..high, or a list of one to `most` of them."""
    value = data.get(name)
    if not isinstance(value, list):
        return integer(data, name, low, high)
    _check_length(value, name, most)
    return [_integer(entry, name, low, high) for entry in value]


def number(data: Body, name: str, low: float, high: float) -> float | None:
    """Return a finite number in low..high."""
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInputError(f"{name}: expected a number, found {_kind(value)}")
    if not low <= value <= high or not math.isfinite(value):
        raise InvalidInputError(f"{name} {_brief(value)}: must lie in {low:g}..{high:g}")
    return float(value)


def text(data: Body, name: str, longest: int) -> str | None:
    """Return a text of at most `longest` characters."""
    value = data.get(name)
    return None if value is None else _text(value, name, longest)


def texts(data: Body, name: str, longest: int, most: int) -> str | list[str] | None:
    """Return a text, or a list of one to `most` of them."""
    value = data.get(name)
    if not isinstance(value, list):
        return text(data, name, longest)
    _check_length(value, name, most)
    return [_text(entry, name, longest) for entry in value]


def flag(data: Body, name: str) -> bool:
    """Return true or false; false if it is missing."""
    value = data.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidInputError(f"{name}: expected true or false, found {_kind(value)}")


def choice(data: Body, name: str, choices: Collection[str]) -> str | None:
    """Return one of the choices."""
    value = data.get(name)
    if value is None or (isinstance(value, str) and value in choices):
        return value
    raise InvalidInputError(f"{name} {_brief(value)}: choose from {', '.join(choices)}")


def mapping(data: Body, name: str) -> dict[str, Any] | None:
    """Return a JSON object."""
    value = data.get(name)
    if value is None or isinstance(value, dict):
        return value
    raise InvalidInputError(f"{name}: expected a JSON object, found {_kind(value)}")


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _integer(value: object, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(f"{name}: expected an integer, found {_kind(value)}")
    if not low <= value <= high:
        raise InvalidInputError(f"{name} {_brief(value)}: must lie in {low}..{high}")
    return value


def _text(value: object, name: str, longest: int) -> str:
    if not isinstance(value, str):
        raise InvalidInputError(f"{name}: expected text, found {_kind(value)}")
    if len(value) > longest:
        raise InvalidInputError(f"{name}: {len(value)} characters; at most {longest} are accepted")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{name}: contains half of a surrogate pair") from error
    return value


def _check_length(values: list[Any], name: str, most: int) -> None:
    if not 1 <= len(values) <= most:
        raise InvalidInputError(f"{name}: {len(values)} values; 1 to {most} are accepted")


def _kind(value: object) -> str:
    return KINDS.get(type(value), "null")


def _brief(value: object) -> str:
    line = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "(a large integer)"
    return line if len(line) <= BRIEF else f"{line[:BRIEF]}..."
