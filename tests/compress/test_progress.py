"""compress/progress.py: log records in plain output, a bar on a terminal, silence where nobody follows."""

from __future__ import annotations

import io
import time

import pytest

from diffpress.compress import progress as module
from diffpress.compress.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_record_comes_every_few_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    with caplog.at_level("INFO", logger="diffpress"), progress("distill", 8, start=2) as advance:
        for done in range(3, 9):
            now_s += 6.0
            advance(done, f"loss {done}")
    # 12 s for 2 of the 6 remaining steps, and so on
    expected = ["distill: 4/8  loss 4  ETA 24 s", "distill: 6/8  loss 6  ETA 12 s", "distill: 8/8  loss 8"]
    assert caplog.messages == expected


@pytest.mark.parametrize(("level", "shows"), [("INFO", True), ("WARNING", False)])
def test_a_terminal_shows_a_bar_if_progress_is_reported(
    level: str, shows: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with caplog.at_level(level, logger="diffpress"), progress("distill", 2) as advance:
        advance(1, "loss 0.5")
        advance(2)
    assert ("distill" in terminal.getvalue()) == shows and caplog.messages == []


def test_only_the_main_process_reports(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "is_main", lambda: False)
    with caplog.at_level("INFO", logger="diffpress"), progress("distill", 1) as advance:
        advance(1)
    assert caplog.messages == []
