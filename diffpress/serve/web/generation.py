"""The two routes that make images: body -> request -> queue -> images -> JSON, or server-sent events.

    event: step     {"index": 0, "step": 3, "steps": 8, "t": 612.0, "preview": "..."}
    event: image    {"index": 0, "seed": 7, "format": "png", "data": "..."}
    event: done     {"model": "icons", "plan": {...}, "timing": {...}, "warnings": []}
    event: error    {"error": {...}}, instead of what is missing

The event loop only waits: bodies are checked and images encoded in threads, and sampled in their model's thread.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from diffpress.serve.batching import Finished, Job
from diffpress.serve.errors import RequestError, request_error
from diffpress.serve.requests import fields, openai_images
from diffpress.serve.requests.encoding import in_base64
from diffpress.serve.requests.image_request import ImageRequest, image_request, model_name
from diffpress.serve.sampling import StepReport
from diffpress.serve.service import Service
from diffpress.serve.web.exchange import EXCHANGE, Exchange, awaited, deadline_exceeded
from diffpress.serve.web.security import read_body

PREVIEW_FORMAT = "png"
STREAM_HEADERS = {"x-accel-buffering": "no"}  # a proxy passes every event on


async def sample(service: Service, request: Request) -> Response:
    """Answer POST /v1/sample."""
    job, until = await _submitted(service, request, is_openai=False)
    if job.request.stream:
        return await _streamed(request, job, until)
    images = await _images(request, job, until)
    return JSONResponse(
        {
            "images": [_image_json(job.request, index, data) for index, data in enumerate(images)],
            **_summary(job),
        }
    )


async def generations(service: Service, request: Request) -> Response:
    """Answer POST /v1/images/generations."""
    job, until = await _submitted(service, request, is_openai=True)
    return JSONResponse(openai_images.images_json(job.request, await _images(request, job, until)))


async def _submitted(service: Service, request: Request, is_openai: bool) -> tuple[Job, float]:
    """Read, check and queue a request; return its job and the time at which it must be done.

    Raises:
        RequestError: It is refused.
        InvalidInputError: Its body is not valid.
    """
    exchange: Exchange = request.scope[EXCHANGE]
    body = await read_body(dict(request.headers), request.receive, service.settings.limits.body)
    received = time.monotonic()
    checked = await asyncio.to_thread(_checked, service, body, is_openai)
    exchange.facts |= _facts(checked, service.settings.log_prompts)
    if service.is_draining:
        raise RequestError(503, "shutting_down", "the server is shutting down")
    batcher = service.batcher(service.store.named(checked.model))
    job = batcher.submit(checked)
    exchange.cleanup.callback(lambda: exchange.facts.update(_timing(job)))
    exchange.cleanup.callback(batcher.cancel, job)
    return job, received + checked.seconds


def _checked(service: Service, body: bytes, is_openai: bool) -> ImageRequest:
    """Return the request of a body; runs in a thread."""
    data = fields.parsed(body)
    if is_openai:
        data = openai_images.sample_body(data)
    model = service.store.named(model_name(data))
    if is_openai:
        data = openai_images.without_empty_prompt(data, model.bundle.spec.conditioning.kind)
    return image_request(data, model, service.settings.limits)


async def _images(request: Request, job: Job, until: float) -> list[str]:
    """Return the images of a job in base64."""
    samples = await awaited(job.images(), request.receive, until - time.monotonic())
    return await asyncio.to_thread(lambda: [_in_base64(job.request, sample) for sample in samples])


async def _streamed(request: Request, job: Job, until: float) -> Response:
    """Return a response whose status is known once the first step is: errors before it have their own."""
    events = job.events()
    first = await awaited(_next(events), request.receive, until - time.monotonic())

    async def chunks() -> AsyncIterator[bytes]:
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 0.0)):
                yield await _chunk(job.request, first)
                async for event in events:
                    yield await _chunk(job.request, event)
            yield _event("done", _summary(job))
        except TimeoutError:
            yield _event("error", deadline_exceeded().to_json())
        except Exception as error:
            yield _event("error", request_error(error).to_json())

    return StreamingResponse(chunks(), headers=STREAM_HEADERS, media_type="text/event-stream")


async def _next(events: AsyncIterator[Finished | StepReport]) -> Finished | StepReport:
    return await anext(events)


async def _chunk(request: ImageRequest, event: Finished | StepReport) -> bytes:
    """Return a step or an image as a server-sent event."""
    if isinstance(event, Finished):
        data = await asyncio.to_thread(_in_base64, request, event.sample)
        return _event("image", {"index": event.image, **_image_json(request, event.image, data)})
    preview = None
    if event.preview is not None:
        preview = await asyncio.to_thread(in_base64, event.preview, PREVIEW_FORMAT, request.spec.data_range)
    return _event(
        "step",
        {"index": event.image, "step": event.step, "steps": event.steps, "t": event.t, "preview": preview},
    )


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _in_base64(request: ImageRequest, sample: np.ndarray) -> str:
    return in_base64(sample, request.format, request.spec.data_range)


def _image_json(request: ImageRequest, index: int, data: str) -> dict[str, Any]:
    label = {} if request.labels is None else {"label": request.labels[index]}
    return {"seed": request.seeds[index], **label, "format": request.format, "data": data}


def _summary(job: Job) -> dict[str, Any]:
    """Return what a response says besides its images."""
    request = job.request
    return {
        "model": request.model,
        "plan": request.spec.plan.to_json(),
        "timing": _timing(job),
        "warnings": list(request.warnings),
    }


def _timing(job: Job) -> dict[str, Any]:
    """Return how long a job waited and was sampled, and the batches that its images were in."""
    if job.started is None:
        return {}
    ended = job.ended or time.monotonic()
    return {
        "queue_ms": round((job.started - job.submitted) * 1e3, 1),
        "sample_ms": round((ended - job.started) * 1e3, 1),
        "batches": job.batches,
    }


def _facts(request: ImageRequest, log_prompts: bool) -> dict[str, Any]:
    """Return what the log says of a request."""
    plan = request.spec.plan
    prompts = {"prompts": request.prompts, "negative_prompts": request.negatives} if log_prompts else {}
    return {"model": request.model, "images": len(request), "solver": plan.solver, "steps": plan.steps, **prompts}
