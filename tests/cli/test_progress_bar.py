"""cli/progress_bar.py: shown on a terminal only, one line that is overwritten, without other characters than ASCII."""

from __future__ import annotations

import io

import pytest

from diffpress.cli.progress_bar import bar_line, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_printed_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(3, "images") as advance:
        advance(1)
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_the_bar_is_overwritten_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with progress_bar(4, "images") as advance:
        for done in (1, 2.5, 4):
            advance(done)
    *lines, last = terminal.getvalue().split("\r")
    assert [line.split("] ")[1].split()[0] for line in lines[:4]] == ["0/4", "1/4", "2/4", "4/4"]
    assert lines[4].strip() == "" and len(lines[4]) >= max(map(len, lines)) and last == ""
    assert terminal.getvalue().isascii() and "\n" not in terminal.getvalue()


def test_a_fast_loop_draws_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    with progress_bar(10_000, "images") as advance:
        for done in range(1, 10_001):
            advance(done)
    assert terminal.getvalue().count("/10000") <= 2


def test_the_time_that_is_left_follows_from_what_is_done() -> None:
    assert bar_line(0, 8, "images", 5.0) == f"[{'.' * 30}] 0/8 images"
    assert bar_line(2, 8, "images", 60.0).endswith("2/8 images  3:00 left")
    assert bar_line(1, 8, "images", 3600.0).endswith("1/8 images  7:00:00 left")
