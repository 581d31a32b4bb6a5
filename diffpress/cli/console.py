"""What a command prints: the log records of the package.

INFO       indented, on stdout; a heading such as '[1/3] prune' is not indented
WARNING    'warning: ...' on stderr
ERROR      'diffpress: ...' on stderr
"""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = "diffpress"


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            print(f"diffpress: {text}", file=sys.stderr)
        elif record.levelno >= logging.WARNING:
            print(f"warning: {text}", file=sys.stderr)
        else:
            print(text if text.startswith("[") else textwrap.indent(text, "  "), flush=True)


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
