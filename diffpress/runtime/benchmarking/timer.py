"""Time functions in alternation, so that thermal throttling and other load on the machine affect all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


def alternating_times_ms(
    works: Sequence[Callable[[], object]], rounds: int, *, max_rounds: int | None = None, enough_ms: float = 0.0
) -> list[list[float]]:
    """Call every function once per round, in order, and return the milliseconds of its calls.

    The caller warms the functions up and takes the medians.

    Args:
        works: Functions to time.
        rounds: Number of rounds.
        max_rounds: Upper limit of further rounds, which run until `enough_ms` have passed; default: none run.
        enough_ms: Milliseconds, all rounds together, after which no further round starts.
    """
    times: list[list[float]] = [[] for _ in works]
    most, began, done = max_rounds or rounds, time.perf_counter(), 0
    while done < rounds or (done < most and _ms_since(began) < enough_ms):
        for work, measured in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            measured.append(_ms_since(start))
        done += 1
    return times


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
