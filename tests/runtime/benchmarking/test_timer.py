"""runtime/benchmarking/timer.py with a fake clock: order of the calls, their times, and when the rounds end."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from diffpress.runtime.benchmarking.timer import alternating_times_ms


class Clock:
    """A clock that moves only while a function runs; `calls` lists the functions that ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.calls = 100.0, ""
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)

    def work(self, name: str, *milliseconds: float) -> Callable[[], None]:
        """Return a function that takes these times in turn."""
        times = iter(milliseconds * 100)

        def work() -> None:
            self.calls += name
            self.now_s += next(times) / 1e3

        return work


def test_functions_alternate_and_every_call_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    first, second = alternating_times_ms([clock.work("a", 1.0, 30.0, 2.0), clock.work("b", 8.0)], 3)
    assert clock.calls == "ababab"
    assert first == pytest.approx([1.0, 30.0, 2.0]) and second == pytest.approx([8.0] * 3)


@pytest.mark.parametrize(
    ("rounds", "max_rounds", "enough_ms", "expected"),
    [
        (5, None, 0.0, 5),  # that many rounds
        (5, None, 1e9, 5),  # no further ones without a limit
        (5, 30, 20.0, 5),  # enough time has passed
        (2, 30, 95.0, 10),  # the tenth round started after 90 ms
        (2, 7, 1e9, 7),  # the limit
    ],
)
def test_rounds_end_when_there_are_enough(
    rounds: int, max_rounds: int | None, enough_ms: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    works = [clock.work("a", 4.0), clock.work("b", 6.0)]
    first, second = alternating_times_ms(works, rounds, max_rounds=max_rounds, enough_ms=enough_ms)
    assert len(first) == len(second) == expected and clock.calls == "ab" * expected
