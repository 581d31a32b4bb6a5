"""ONNX Runtime Web: the files of its npm package that a browser loads, copied from where npm installed it.

The package is the user's, as an engine's Python package is: diffpress neither contains nor downloads it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from diffpress.runtime.errors import InvalidInputError

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"  # the version that was tested
INSTALL = f"npm install --no-save --ignore-scripts {PACKAGE}@{VERSION}"

# engine -> its entry point and what that loads; the page loads those of one engine
FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": (
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
}
NOTICE = """{package} {version}, https://github.com/microsoft/onnxruntime

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


class WebRuntime(NamedTuple):
    """An npm package on this machine."""

    folder: Path
    version: str


def find_web_runtime(folder: str | Path | None = None) -> WebRuntime:
    """Return the npm package with all files that the page needs.

    Args:
        folder: The unpacked package; None looks for node_modules in the working folder and those above it.

    Raises:
        InvalidInputError: There is none, or it lacks a file.
    """
    if folder is None:
        here = Path.cwd()
        places = [place / "node_modules" / PACKAGE for place in (here, *here.parents)]
        found = next((place for place in places if (place / "package.json").is_file()), None)
        if found is None:
            raise InvalidInputError(
                f"target web needs the npm package {PACKAGE}, and no node_modules here has it: run '{INSTALL}', or "
                "give its folder with --web-runtime"
            )
        folder = found
    package = Path(folder)
    version = _version(package)
    for name in (name for names in FILES.values() for name in names):
        if not (package / "dist" / name).is_file():
            raise InvalidInputError(
                f"{package}: {PACKAGE} {version} has no dist/{name}; use the version that was tested: '{INSTALL}'"
            )
    return WebRuntime(package, version)


def copy_web_runtime(runtime: WebRuntime, target: Path) -> None:
    """Copy the files that the page loads, and the package's licence, into a new folder."""
    target.mkdir()
    for name in (name for names in FILES.values() for name in names):
        shutil.copyfile(runtime.folder / "dist" / name, target / name)
    (target / "LICENSE").write_text(NOTICE.format(package=PACKAGE, version=runtime.version), encoding="utf-8")


def _version(package: Path) -> str:
    file = package / "package.json"
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
        if entry["name"] == PACKAGE:
            return str(entry["version"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InvalidInputError(f"--web-runtime {package}: not the npm package {PACKAGE}; unpack it with '{INSTALL}'")
