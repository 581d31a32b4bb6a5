"""`diffpress cache`: what is in the cache folder, and remove it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

EXAMPLE = "diffpress cache info"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress cache`."""
    parser.add_argument("action", choices=("info", "clear"), help="show what is cached, or remove it")


def run(args: argparse.Namespace) -> int:
    """Print the size of what is cached, or remove it; other files in the folder are kept."""
    from diffpress.runtime.engines.cache import CONTENTS, cache_folder, limit_bytes

    folder, limit = cache_folder(), limit_bytes()
    print(f"{folder}, limit {limit / 2**30:g} GiB (DIFFPRESS_CACHE, DIFFPRESS_CACHE_GIB)")
    for kind, pattern in CONTENTS.items():
        found = sorted(folder.glob(pattern))
        size = sum(_bytes(path) for path in found) / 2**20
        if args.action == "clear":
            for path in found:
                _remove(path)
        print(f"  {kind:<22} {len(found):>4}  {size:>9.1f} MiB{' removed' if args.action == 'clear' and found else ''}")
    return 0


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_file())


def _remove(path: Path) -> None:
    """Remove a file or a folder; one that another process has removed meanwhile is no error.

    Raises:
        InvalidInputError: It cannot be removed.
    """
    from diffpress.runtime.errors import InvalidInputError

    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInputError(f"{path}: cannot be removed ({reason}); change the folder's permissions") from error
