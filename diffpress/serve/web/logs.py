"""Structured logs: one JSON object a line on stdout, instead of what a command prints.

    {"time": "2026-11-30T12:00:00.000Z", "level": "info", "event": "request", "route": "/v1/sample", "status": 200, ...}

Prompts are logged only if that was asked for, also those in the messages of the runtime.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

PACKAGES = ("diffpress", "uvicorn")
PROMPT_LOGGER = "diffpress.runtime.prompts"  # its messages quote prompts
FACTS = "facts"  # attribute of a record: further entries of its line
OWN_EVENT = "log"

access_logger = logging.getLogger("diffpress.serve.access")


class JsonHandler(logging.Handler):
    """Writes records as JSON lines to a stream."""

    def __init__(self, stream: TextIO, log_prompts: bool) -> None:
        super().__init__()
        self._stream, self._log_prompts = stream, log_prompts

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if record.name == PROMPT_LOGGER and not self._log_prompts:
            return  # the response has it as a warning
        facts: dict[str, Any] = getattr(record, FACTS, {})
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **(facts or {"event": OWN_EVENT, "message": record.getMessage()}),
        }
        if record.exc_info:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)
        self._stream.write(json.dumps(line, default=str) + "\n")
        self._stream.flush()


def log_event(event: str, **facts: Any) -> None:
    """Log an event with its facts."""
    access_logger.info(event, extra={FACTS: {"event": event, **facts}})


@contextmanager
def json_logs(log_prompts: bool, stream: TextIO | None = None) -> Iterator[None]:
    """Write the records of diffpress and uvicorn as JSON lines, and nowhere else, until the block ends."""
    handler = JsonHandler(stream or sys.stdout, log_prompts)
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if logger.name == PACKAGES[0] else logging.WARNING)
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
