"""Parse JSON into dataclasses; unknown, missing and mistyped entries raise InvalidInputError."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

from diffpress.runtime.errors import InvalidInputError

LARGEST = 2**31 - 1  # upper bound of counts, labels and sizes


@contextmanager
def convert_errors(where: str) -> Iterator[None]:
    """Convert lookup and conversion errors raised inside the block to InvalidInputError naming `where`."""
    try:
        yield
    except KeyError as error:
        raise InvalidInputError(f"{where}: the entry {error} is missing") from error
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InvalidInputError(f"{where}: {error}") from error


def check_fields(cls: type, data: Any, where: str) -> dict[str, Any]:
    """Check that `data` is a JSON object whose keys are all fields of the dataclass `cls`, and return it.

    Raises:
        InvalidInputError: `data` is not an object, or has an unknown entry.
    """
    if not isinstance(data, dict):
        raise InvalidInputError(f"{where}: expected a JSON object, found {type(data).__name__}")
    unknown = sorted(set(data) - {f.name for f in fields(cls)})
    if unknown:
        raise InvalidInputError(f"{where}: unknown entry '{unknown[0]}'")
    return data


def without_defaults(value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return a dataclass as a dict, without those of the named fields that have their default value.

    Fields that were added later are named, so that the JSON form of older data, and its hash, stays the same.
    """
    defaults = {field.name: field.default for field in fields(value)}
    unused = {name for name in names if getattr(value, name) == defaults[name]}
    return {name: entry for name, entry in asdict(value).items() if name not in unused}


def floats(values: Any) -> tuple[float, ...]:
    """Convert an iterable of numbers to a tuple of floats."""
    return tuple(float(v) for v in values)


def boolean(value: Any) -> bool:
    """Return `value` if it is a bool; raises ValueError otherwise."""
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {value!r}")
    return value
