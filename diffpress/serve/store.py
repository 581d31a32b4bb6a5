"""Which models are open: those that were used last, within a memory budget."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.pipeline import Pipeline
from diffpress.serve.errors import RequestError
from diffpress.serve.models import DEFAULT, Model

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ModelStore:
    """The models by name, and which of them are open.

    Args:
        models: At least one; the first is the default.
        budget_bytes: Size of the open models together; None for no limit.

    Raises:
        InvalidInputError: Two models have one name, or one alone is larger than the budget.
    """

    def __init__(self, models: Sequence[Model], budget_bytes: int | None = None) -> None:
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models) or DEFAULT in self.models:
            names = ", ".join(model.name for model in models)
            raise InvalidInputError(
                f"models {names}: each needs a name of its own, and not '{DEFAULT}'; name a bundle with NAME=PATH"
            )
        for model in models:
            if budget_bytes is not None and model.graph_bytes > budget_bytes:
                raise InvalidInputError(
                    f"{model.bundle.path}: its graphs have {model.graph_bytes / 2**20:.1f} MiB, more than the memory "
                    f"budget of {budget_bytes / 2**20:.1f} MiB"
                )
        self._budget = budget_bytes
        self._turn, self._opening, self._freed = asyncio.Lock(), asyncio.Lock(), asyncio.Event()

    def named(self, name: str | None) -> Model:
        """Return a model; the first one for None and 'default'. Raises RequestError (404) for an unknown name."""
        if name is None or name == DEFAULT:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise RequestError(404, "model_not_found", str(unknown_name("model", name, (*self.models, DEFAULT))))
        return self.models[name]

    @property
    def open_models(self) -> list[Model]:
        """Models that are open or being opened."""
        return [model for model in self.models.values() if model.pipeline is not None or model.users]

    @property
    def _open_bytes(self) -> int:
        return sum(model.graph_bytes for model in self.open_models)

    @asynccontextmanager
    async def using(self, model: Model) -> AsyncIterator[Pipeline]:
        """Keep a model open, after closing others that the budget has no room for, the least recently used first.

        Raises:
            InvalidInputError: It cannot be opened.
        """
        async with self._turn:  # in the order of arrival, so that a busy model cannot keep another one out
            if model.pipeline is None and not model.users:
                await self._make_room(model)
            model.users += 1
        try:
            model.last_used = time.monotonic()
            yield await self._opened(model)
        finally:
            model.users -= 1
            self._freed.set()

    async def _opened(self, model: Model) -> Pipeline:
        if model.pipeline is not None:
            return model.pipeline
        async with self._opening:  # one at a time, since several would compile on the same processors
            if model.pipeline is None:
                started = time.monotonic()
                model.pipeline = await _in_thread(model, model.open)
                logger.info(
                    f"opened {model.name} in {model.pipeline.denoiser.name}, {time.monotonic() - started:.1f} s"
                )
            return model.pipeline

    async def _make_room(self, model: Model) -> None:
        """Close models until `model` fits; wait for those that are in use."""
        while self._budget is not None and self._open_bytes + model.graph_bytes > self._budget:
            idle = [other for other in self.open_models if not other.users]
            if idle:
                await self._close(min(idle, key=lambda other: other.last_used))
                continue
            self._freed.clear()
            await self._freed.wait()

    async def _close(self, model: Model) -> None:
        pipeline, model.pipeline = model.pipeline, None
        if pipeline is not None:
            await _in_thread(model, pipeline.close)
            logger.info(f"closed {model.name}")

    async def close(self) -> None:
        """Close all models."""
        for model in self.models.values():
            await self._close(model)
            model.thread.shutdown()


async def _in_thread(model: Model, run: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(model.thread, run)
