"""Run a user's Python file: its folder is on the path meanwhile, and the modules it imports from there stay its own.

Modules beside the file are removed from sys.modules afterwards, so that two files whose neighbours have the same names
do not get each other's. An error in the user's code becomes one line with the file and line where it happened.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

from diffpress.runtime.errors import DiffpressError, InvalidInputError

MESSAGE_LENGTH = 300


def run_file(file: Path) -> ModuleType:
    """Execute a Python file as a module and return it; call it inside `neighbours_importable` and `user_errors`."""
    # a dataclass looks its own module up in sys.modules
    name = f"diffpress_custom_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    definition = importlib.util.spec_from_file_location(name, file)
    if definition is None or definition.loader is None:
        raise InvalidInputError(f"{file}: cannot be imported")
    module = sys.modules[name] = importlib.util.module_from_spec(definition)
    definition.loader.exec_module(module)
    return module


@contextmanager
def neighbours_importable(folder: Path) -> Iterator[None]:
    """Put a folder first on the path, ahead of modules of the same names that were imported from elsewhere."""
    path, before = str(folder.resolve()), set(sys.modules)
    hidden = {name: sys.modules.pop(name) for name in _shadowing(path)}
    sys.path.insert(0, path)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if path in sys.path:
            sys.path.remove(path)
        own = {name for name in set(sys.modules) - (before - set(hidden)) if "." not in name and _lies_in(name, path)}
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        sys.modules.update(hidden)


def _shadowing(folder: str) -> list[str]:
    """Return the imported modules that have the name of one in the folder, with their submodules."""
    tops = {name for name in sys.modules if "." not in name} - set(sys.stdlib_module_names) - {"diffpress", "__main__"}
    found = set()
    for name in tops:
        neighbour = PathFinder.find_spec(name, [folder])
        if neighbour is not None and neighbour.origin is not None and not _lies_in(name, folder):
            found.add(name)
    return [name for name in sys.modules if name.partition(".")[0] in found]


def _lies_in(name: str, folder: str) -> bool:
    """Return whether an imported top-level module is a file or a package directly inside the folder."""
    module = sys.modules[name]
    places = [getattr(module, "__file__", None), *(getattr(module, "__path__", None) or ())]
    inside = {str(Path(folder, name)), str(Path(folder, f"{name}.py")), str(Path(folder, name, "__init__.py"))}
    return any(str(Path(place).resolve()) in inside for place in places if place)


@contextmanager
def user_errors(file: Path, doing: str) -> Iterator[None]:
    """Turn any error of the user's code inside the block into InvalidInputError: file, line and message in one line.

    Torch's default dtype and gradient mode are restored, whatever the code did to them.
    """
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    except (Exception, SystemExit) as error:  # user code may raise anything
        message = " ".join(str(error).split())
        if len(message) > MESSAGE_LENGTH:
            message = f"{message[:MESSAGE_LENGTH]}..."
        what = message if isinstance(error, DiffpressError) else f"{type(error).__name__}: {message}"
        raise InvalidInputError(f"{_place(error, file)}: {doing} failed: {what}") from error
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


def _place(error: BaseException, file: Path) -> str:
    """Return 'file:line' of the innermost code in the file's folder; the file alone if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    folder = file.resolve().parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if folder in Path(frame.filename).resolve().parents and "site-packages" not in frame.filename
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)
