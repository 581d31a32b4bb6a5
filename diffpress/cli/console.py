"""What a command prints: the log records of the package.

INFO       indented, on stdout; a heading such as '[1/3] prune' is not indented
WARNING    'warning: ...' on stderr, once for each text
ERROR      'diffpress: ...' on stderr, in one line of at most MAX_LINE characters

Characters that the terminal cannot show are written in ASCII. Control characters, which a file's names may contain to
change what the terminal shows, are written as escapes.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = "diffpress"
ASCII = {"±": "+-", "×": "x", "–": "-"}
MAX_LINE = 1500
# C0 and C1 controls, line separators, and characters that change the direction of the text around them
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
CONTROL_IN_LINES = re.compile(f"(?![\n\t]){CONTROL.pattern}")


class _Console(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(record.getMessage(), lines=record.levelno < logging.WARNING)
        if record.levelno >= logging.ERROR:
            print(f"diffpress: {shortened(text)}", file=sys.stderr)
        elif record.levelno >= logging.WARNING:
            if text not in self._warned:
                print(f"warning: {text}", file=sys.stderr)
            self._warned.add(text)
        else:
            print(text if text.startswith("[") else textwrap.indent(text, "  "), flush=True)


def printable(text: str, lines: bool = False) -> str:
    """Return text with control characters as escapes; `lines` keeps line breaks and tabs."""
    pattern = CONTROL_IN_LINES if lines else CONTROL
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(text: str) -> str:
    """Return text of at most MAX_LINE characters: its start and its end, which says what to do."""
    if len(text) <= MAX_LINE:
        return text
    return f"{text[: MAX_LINE * 2 // 3]} ... {text[-MAX_LINE // 4 :]}"


def in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: the ASCII form of characters that an encoding lacks, and where to continue."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


def show_every_character() -> None:
    """Let stdout and stderr write ASCII for characters that their encoding lacks, instead of raising an error."""
    codecs.register_error("diffpress.ascii", in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="diffpress.ascii")


@contextmanager
def console() -> Iterator[None]:
    """Print the log records of the package."""
    logger, handler = logging.getLogger(PACKAGE), _Console()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
