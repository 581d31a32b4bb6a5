"""Progress of long tasks: a live bar with ETA on a terminal, otherwise a log record every few seconds.

The bar is shown only where records of level INFO are reported, as commands do.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from diffpress.compress.training.distributed import is_main

logger = logging.getLogger(__name__)

PLAIN_EVERY_S = 10.0


class Advance(Protocol):
    """Callback that reports progress: `done` so far, and a figure to show, such as the loss."""

    def __call__(self, done: int, note: str = "") -> None:
        """Report `done` of the total, and `note` beside it."""
        ...


@contextmanager
def progress(what: str, total: int, start: int = 0) -> Iterator[Advance]:
    """Show progress of `what`; yield `advance(done, note)`, where `done` counts from 0 to `total`."""
    if not is_main():
        yield lambda done, note="": None
    elif sys.stdout.isatty() and logger.isEnabledFor(logging.INFO):
        with _bar(what, total, start) as advance:
            yield advance
    else:
        yield _plain(what, total, start)


@contextmanager
def _bar(what: str, total: int, start: int) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=start, note="")
        yield lambda done, note="": bar.update(task, completed=done, note=note)


def _plain(what: str, total: int, start: int) -> Advance:
    began = last = time.monotonic()

    def advance(done: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY_S and done < total:
            return
        last = now
        eta_s = (now - began) / max(done - start, 1) * (total - done)
        logger.info(f"{what}: {done}/{total}  {note}  {f'ETA {eta_s:.0f} s' if done < total else ''}".rstrip())

    return advance
