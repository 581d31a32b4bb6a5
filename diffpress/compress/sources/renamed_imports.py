"""Imports of diffpress 0.1, whose packages were named `compress`, `export` and `runtime`, and what replaces them."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import diffpress
from diffpress.runtime.errors import InvalidInputError

PACKAGES = ("compress", "export", "runtime")
RENAMED = {
    "BadInput": "InvalidInputError",
    "GateFailed": "GateFailedError",
    "MissingExtra": "MissingDependencyError",
    "Plan": "SamplingPlan",
    "Unfit": "EngineUnavailableError",
}


def refuse_old_imports(file: Path) -> None:
    """Raise InvalidInputError, naming the replacement, if a user's file imports from a package of diffpress 0.1.

    A package of the user's own that lies beside the file and has such a name is not meant.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # importing the file reports it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in modules:
            package = module.partition(".")[0]
            own = file.parent / package
            if package in PACKAGES and not own.is_dir() and not own.with_suffix(".py").is_file():
                raise InvalidInputError(f"{file}:{node.lineno}: {_replacement(module, name)}")


def _replacement(module: str, name: str) -> str:
    old = f"from {module} import {name}" if name else f"import {module}"
    name = RENAMED.get(name, name)
    if name in diffpress.__all__:
        return f"'{old}' is now 'from diffpress import {name}'"
    new = f"diffpress.{module}"
    try:
        exists = importlib.util.find_spec(new) is not None
    except ModuleNotFoundError:
        exists = False
    if exists:
        return f"'{old}' is now '{f'from {new} import {name}' if name else f'import {new}'}'"
    return f"'{old}': the module moved into the package diffpress; docs/compatibility.md lists what replaces it"
