"""`diffpress cache`: show or remove what diffpress stores in the cache folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from diffpress.runtime.engines.cache import CONTENTS, cache_folder, limit_bytes
from diffpress.runtime.errors import InvalidInputError

EXAMPLE = "diffpress cache info"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress cache`."""
    parser.add_argument("action", choices=("info", "clear"), help="show what is cached, or remove it")


def run(args: argparse.Namespace) -> int:
    """Print the size of what is cached, and remove it for `clear`; other files in the folder are kept."""
    folder, limit = cache_folder(), limit_bytes()
    print(f"{folder} (DIFFPRESS_CACHE)")
    for kind, pattern in CONTENTS.items():
        found = sorted(folder.glob(pattern))
        line = f"  {kind:<22} {len(found):>4}  {sum(map(_bytes, found)) / 2**20:>9.1f} MiB"
        if kind == "compiled models":
            line += f" of {limit / 2**20:.0f} (DIFFPRESS_CACHE_GIB)"
        if args.action == "clear" and found:
            for path in found:
                _remove(path)
            line += ", removed"
        print(line)
    return 0


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_file())


def _remove(path: Path) -> None:
    """Remove a file or a folder; that another process has removed it meanwhile is no error.

    Raises:
        InvalidInputError: It cannot be removed.
    """
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInputError(f"{path}: cannot be removed ({reason}); change the folder's permissions") from error
