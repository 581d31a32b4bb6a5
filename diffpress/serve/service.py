"""The server's state: models, queues, metrics, and whether it still accepts requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from diffpress.serve.batching import Batcher
from diffpress.serve.errors import RequestError, after
from diffpress.serve.models import Model
from diffpress.serve.settings import Access, Batching, Limits
from diffpress.serve.store import ModelStore
from diffpress.serve.web.metrics import Metrics

RESTART_SECONDS = 5  # after which a client of a server that shuts down may try again


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        limits: Limits of a request.
        batching: Batching of every model.
        access: Who may connect.
        budget_bytes: Size of the graphs of all open models together; None for no limit.
        log_prompts: Whether prompts are logged.
    """

    limits: Limits = field(default_factory=Limits)
    batching: Batching = field(default_factory=Batching)
    access: Access = field(default_factory=Access)
    budget_bytes: int | None = None
    log_prompts: bool = False


class Service:
    """All that requests share.

    Args:
        models: At least one; the first is the default.
        settings: Settings.

    Attributes:
        in_progress: Requests of images that are not answered yet.
        is_ready: Whether the default model was opened.
        is_draining: Whether new requests are refused, since the server shuts down.

    Raises:
        InvalidInputError: As in `ModelStore`.
    """

    def __init__(self, models: Sequence[Model], settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.store = ModelStore(models, settings.budget_bytes)
        self._batchers = {model.name: Batcher(model, self.store, settings.batching, self.metrics) for model in models}
        self.in_progress, self.is_ready, self.is_draining = 0, False, False
        self.idle = asyncio.Event()
        self.idle.set()

    def batcher(self, model: Model) -> Batcher:
        """Return the queue of a model."""
        return self._batchers[model.name]

    async def preload(self) -> None:
        """Open the default model; raises InvalidInputError if that fails."""
        async with self.store.using(self.store.named(None)):
            self.is_ready = True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sample what is submitted until the block ends, then close all models."""
        tasks = [asyncio.create_task(batcher.run()) for batcher in self._batchers.values()]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await self.store.close()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request for images as in progress; raises RequestError (503) while the server shuts down."""
        if self.is_draining:
            raise RequestError(503, "shutting_down", "the server is shutting down", after(RESTART_SECONDS))
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self.in_progress += change
        self.metrics.running(self.in_progress)
        if self.in_progress:
            self.idle.clear()
        else:
            self.idle.set()
