"""Dynamic batching of one model: images of the same plan and size are sampled together, whichever request they are of.

    submit -> waiting images -> [oldest image's plan: up to `images` of them, after at most `wait_ms`] -> model's thread

A batch has 1, 2, 4, ... or `images` images, since engines compile for every batch size; the others stay in the queue.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np

from diffpress.runtime.errors import EngineUnavailableError
from diffpress.runtime.pipeline import Pipeline
from diffpress.serve.errors import RequestError, after
from diffpress.serve.models import Model, batch_sizes
from diffpress.serve.requests.image_request import ImageRequest
from diffpress.serve.sampling import AbandonedError, Part, StepReport, sampled
from diffpress.serve.settings import Batching
from diffpress.serve.store import ModelStore
from diffpress.serve.web.metrics import Metrics

logger = logging.getLogger(__name__)

PENDING_PREVIEW_BYTES = 2**24  # of a request; a client that reads slower misses some
SMOOTHING = 0.3  # weight of the last batch in the time per image


class Finished(NamedTuple):
    """A finished image of a request: its index, and the sample, float32 in the data range."""

    image: int
    sample: np.ndarray


class Job:
    """A request in the queue, and what has happened to it.

    Attributes:
        request: The request.
        submitted: When it was queued, in seconds of the monotonic clock.
        started: When its first image was started, or None.
        ended: When its last batch was finished, or None.
        batches: Size of the batch that each of its finished images was in.
        is_cancelled: Whether nobody waits for it any more.
    """

    def __init__(self, request: ImageRequest) -> None:
        self.request, self.submitted = request, time.monotonic()
        self.started: float | None = None
        self.ended: float | None = None
        self.batches: list[int] = []
        self.is_cancelled = False
        self._events: asyncio.Queue[Finished | StepReport | RequestError] = asyncio.Queue()
        self._preview_bytes = 0

    async def events(self) -> AsyncIterator[Finished | StepReport]:
        """Yield what happens until all images are finished; raises RequestError if they cannot be made."""
        left = len(self.request)
        while left:
            event = await self._events.get()
            if isinstance(event, RequestError):
                raise event
            if isinstance(event, Finished):
                left -= 1
            elif isinstance(event, StepReport) and event.preview is not None:
                self._preview_bytes -= event.preview.nbytes
            yield event

    async def images(self) -> list[np.ndarray]:
        """Return all images in order; raises RequestError if they cannot be made."""
        found = {event.image: event.sample async for event in self.events() if isinstance(event, Finished)}
        return [found[index] for index in range(len(self.request))]

    def tell(self, event: Finished | StepReport | RequestError) -> None:
        """Add an event; called in the event loop."""
        if self.is_cancelled:
            return
        if isinstance(event, StepReport) and self._preview_bytes > PENDING_PREVIEW_BYTES:
            event = event._replace(preview=None)
        if isinstance(event, StepReport) and event.preview is not None:
            self._preview_bytes += event.preview.nbytes
        self._events.put_nowait(event)


class _Waiting(NamedTuple):
    job: Job
    part: Part


class Batcher:
    """The queue of one model."""

    def __init__(self, model: Model, store: ModelStore, settings: Batching, metrics: Metrics) -> None:
        self.model, self._store, self._settings, self._metrics = model, store, settings, metrics
        self._most = settings.images * model.options.streams
        self._sizes = (
            *batch_sizes(settings.images),
            *(settings.images * k for k in range(2, model.options.streams + 1)),
        )
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._seconds_per_image = 0.0

    def submit(self, request: ImageRequest) -> Job:
        """Queue a request; raises RequestError (429) if its images find no place."""
        if len(self._waiting) + len(request) > self._settings.queue:
            seconds = max(1, math.ceil(len(self._waiting) * self._seconds_per_image))
            raise RequestError(
                429,
                "queue_full",
                f"{len(self._waiting)} images wait for {self.model.name}, of {self._settings.queue} at most; try again "
                f"in {seconds} s",
                after(seconds),
            )
        job = Job(request)
        self._waiting.extend(_Waiting(job, Part(request, index)) for index in range(len(request)))
        self._changed()
        return job

    def cancel(self, job: Job) -> None:
        """Forget a request: its waiting images leave the queue, and the results of running ones are dropped."""
        job.is_cancelled = True
        self._waiting = deque(entry for entry in self._waiting if entry.job is not job)
        self._changed()

    async def run(self) -> None:
        """Sample what is submitted, forever."""
        while True:
            await self._arrived.wait()
            if not self._waiting:
                self._arrived.clear()
                continue
            try:
                async with self._store.using(self.model) as pipeline:
                    batch = await self._gathered()
                    if batch:
                        await self._sample(pipeline, batch)
            except Exception as error:  # the model cannot be opened
                self._fail([entry.job for entry in self._waiting], error)

    async def _gathered(self) -> list[_Waiting]:
        """Return the next batch, which leaves the queue; empty if everything was cancelled."""
        while self._waiting:
            oldest = self._waiting[0]
            key = oldest.part.request.key
            group = [entry for entry in self._waiting if entry.part.request.key == key][: self._most]
            wait = oldest.job.submitted + self._settings.wait_ms / 1e3 - time.monotonic()
            if len(group) == self._most or wait <= 0:
                size = max(size for size in self._sizes if size <= len(group))
                chosen = {id(entry) for entry in group[:size]}
                self._waiting = deque(entry for entry in self._waiting if id(entry) not in chosen)
                self._changed()
                return group[:size]
            self._arrived.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._arrived.wait()
            except TimeoutError:
                self._arrived.set()
        return []

    async def _sample(self, pipeline: Pipeline, batch: list[_Waiting]) -> None:
        loop, started = asyncio.get_running_loop(), time.monotonic()
        for job, _ in batch:
            job.started = job.started or started

        def report(position: int, step: StepReport) -> None:
            loop.call_soon_threadsafe(batch[position].job.tell, step)

        def work() -> list[np.ndarray]:
            return sampled(
                pipeline,
                self.model.options,
                [part for _, part in batch],
                self._settings.images,
                report,
                lambda: all(job.is_cancelled for job, _ in batch),
            )

        try:
            images = await loop.run_in_executor(self.model.thread, work)
        except AbandonedError:
            return
        except Exception as error:
            self._fail([job for job, _ in batch], error)
            return
        ended = time.monotonic()
        self._observe(len(batch), ended - started)
        for (job, part), image in zip(batch, images, strict=True):
            job.ended = ended
            job.batches.append(len(batch))
            job.tell(Finished(part.image, image))

    def _observe(self, size: int, seconds: float) -> None:
        self._metrics.batch(self.model.name, size, seconds)
        known = self._seconds_per_image or seconds / size
        self._seconds_per_image = (1 - SMOOTHING) * known + SMOOTHING * seconds / size

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        """Answer the requests of these jobs with an error, and forget them."""
        logger.error(f"{self.model.name}: {type(error).__name__}: {error}", exc_info=error)
        if isinstance(error, EngineUnavailableError):
            answer = RequestError(503, "engine_unavailable", f"{self.model.name} cannot be opened on this server")
        else:
            answer = RequestError(500, "sampling_failed", f"{self.model.name} failed; the server's log has the reason")
        for job in dict.fromkeys(jobs):
            job.tell(answer)
            self.cancel(job)

    def _changed(self) -> None:
        self._metrics.waiting(self.model.name, len(self._waiting))
        self._arrived.set()
