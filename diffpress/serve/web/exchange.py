"""One request and its response: what the log says of it, and what is released when it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from diffpress.serve.errors import RequestError
from diffpress.serve.web.security import Receive, client_gone

EXCHANGE = "diffpress.exchange"  # in the ASGI scope
T = TypeVar("T")


class Exchange:
    """A request on its way.

    Attributes:
        id: Its id in the log and in the response's header `x-request-id`.
        facts: Further entries of its line in the log.
        cleanup: Called when it ends, however it ends.
    """

    def __init__(self, identifier: str) -> None:
        self.id = identifier
        self.facts: dict[str, Any] = {}
        self.cleanup = contextlib.ExitStack()


async def awaited(work: Coroutine[Any, Any, T], receive: Receive, seconds: float) -> T:
    """Return the result of `work`.

    Raises:
        RequestError: It is not there in time (504), or the client has gone (499).
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise client_gone() if gone.done() else deadline_exceeded()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def deadline_exceeded() -> RequestError:
    """Return the error of a request that took longer than it may."""
    return RequestError(504, "deadline_exceeded", "the images were not finished before the request's deadline")


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone; the body was received before."""
    while (await receive())["type"] != "http.disconnect":
        pass
