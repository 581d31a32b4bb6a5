"""A progress bar on stderr, without any package. It is shown on a terminal only, and in ASCII."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WIDTH = 30
EVERY_S = 0.1


def is_shown() -> bool:
    """Return whether stderr is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def progress_bar(total: int, unit: str) -> Iterator[Callable[[float], None]]:
    """Show how many of `total` are done; the context gives `advance(done)`, where `done` may lie between two counts."""
    if total < 1 or not is_shown():
        yield lambda done: None
        return
    began = time.monotonic()
    drawn, longest = 0.0, 0

    def advance(done: float) -> None:
        nonlocal drawn, longest
        now = time.monotonic()
        if now - drawn < EVERY_S and done < total:
            return
        drawn, line = now, bar_line(done, total, unit, now - began)
        longest = max(longest, len(line))
        # the cursor stays at the start of the line, so that other output overwrites the bar
        print(line.ljust(longest), end="\r", file=sys.stderr, flush=True)

    try:
        advance(0.0)
        yield advance
    finally:
        print(" " * longest, end="\r", file=sys.stderr, flush=True)


def bar_line(done: float, total: int, unit: str, elapsed_s: float) -> str:
    """Return the bar as one line of text, with the time that is left once there is something to estimate it from."""
    filled = int(WIDTH * done / total)
    left = f"  {_time(elapsed_s / done * (total - done))} left" if done > 0 else ""
    return f"[{'#' * filled}{'.' * (WIDTH - filled)}] {int(done)}/{total} {unit}{left}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
