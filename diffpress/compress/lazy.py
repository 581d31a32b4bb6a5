"""Functions in tables: named, and imported when they are called, so that reading a recipe does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any


def lazy(name: str) -> Callable[..., Any]:
    """Return a function that imports "module:function" and calls it."""
    return lambda *args, **kwargs: resolve_name(name)(*args, **kwargs)
