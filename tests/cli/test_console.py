"""cli/console.py: how log records become the lines of a command."""

from __future__ import annotations

import importlib.util
import io
import logging

import pytest

from diffpress.cli.console import MAX_LINE, console, printable, show_every_character

logger = logging.getLogger("diffpress.somewhere")
Captured = pytest.CaptureFixture[str]


def test_information_is_indented_on_stdout_but_headings_are_not(capsys: Captured) -> None:
    with console():
        logger.info("[1/3] prune")
        logger.info("parameters 4 -> 2")
        logger.info("first\nsecond\n\n  third")
        logger.debug("details")
    assert capsys.readouterr() == ("[1/3] prune\n  parameters 4 -> 2\n  first\n  second\n\n    third\n", "")


def test_warnings_and_errors_go_to_stderr(capsys: Captured) -> None:
    with console():
        logger.warning("no text encoder")
        logger.error("[Errno 2] no such file")
    assert capsys.readouterr() == ("", "warning: no text encoder\ndiffpress: [Errno 2] no such file\n")


def test_other_packages_are_not_printed(capsys: Captured) -> None:
    with console():
        logging.getLogger("elsewhere").info("not ours")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_logger_is_as_before(fails: bool, capsys: Captured, caplog: pytest.LogCaptureFixture) -> None:
    package = logging.getLogger("diffpress")
    before = (list(package.handlers), package.level, package.propagate)
    try:
        with console():
            assert len(package.handlers) == len(before[0]) + 1 and not package.propagate
            logger.info("inside")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert (list(package.handlers), package.level, package.propagate) == before
    assert caplog.text == ""  # a command's lines do not also reach the handlers of the program around it
    logger.warning("outside")
    assert capsys.readouterr() == ("  inside\n", "") and "outside" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_only_the_main_process_reports_progress(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffpress.compress.training import distributed

    for rank in (0, 1):
        monkeypatch.setattr(distributed, "index", lambda rank=rank: rank)
        with console(), distributed.together():
            logger.info(f"progress of {rank}")
            logger.warning(f"warning of {rank}")
    assert capsys.readouterr() == ("  progress of 0\n", "warning: warning of 0\nwarning: warning of 1\n")


def test_the_same_warning_is_printed_once(capsys: Captured) -> None:
    with console():
        for text in ("too long", "other", "too long"):
            logger.warning(text)
    assert capsys.readouterr().err == "warning: too long\nwarning: other\n"


def test_characters_that_the_encoding_lacks_are_written_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    show_every_character()
    terminal.write("1.0 ± 0.1, café, 漢, \udcc3")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"1.0 +- 0.1, caf\\xe9, \\u6f22, \\udcc3"


def test_control_characters_of_a_name_cannot_change_the_terminal(capsys: Captured) -> None:
    name = "\x1b]0;owned\x07\x1b[2J\r\nfake: \u202etxt\u2028\x9b"
    with console():
        for log in (logger.info, logger.warning, logger.error):
            log(f"{name}: é漢🦊 unknown")
    out, err = capsys.readouterr()
    safe = r"\x1b]0;owned\x07\x1b[2J\r" + "{}fake: " + r"\u202etxt\u2028\x9b: " + "é漢🦊 unknown"
    assert out == "  " + safe.format("\n  ") + "\n"  # information may have several lines
    assert err == f"warning: {safe.format(chr(92) + 'n')}\ndiffpress: {safe.format(chr(92) + 'n')}\n"
    assert printable("plain text\tand") == r"plain text\tand" and printable("a\tb\n", lines=True) == "a\tb\n"


def test_an_error_of_a_million_characters_is_shortened_to_its_start_and_its_end(capsys: Captured) -> None:
    with console():
        logger.error("start" + "x" * 1_000_000 + "; choose another")
    line = capsys.readouterr().err
    assert len(line) < MAX_LINE + 20 and line.startswith("diffpress: start") and line.endswith("; choose another\n")
