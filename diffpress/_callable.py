"""Packages that are also functions: `diffpress.compress(...)` is the verb, `diffpress.compress.pipeline` a module.

Python sets a subpackage as an attribute of its parent when it is imported, which would replace a function of the same
name. So the subpackage itself is callable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """A package whose call is the function of the same name in `diffpress.api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from diffpress import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(package: str) -> None:
    """Make the imported package `package` callable."""
    sys.modules[package].__class__ = _CallablePackage
