"""The queue: every request is answered exactly once, places are bounded, and are freed by deadlines and departures."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.pipeline import Pipeline
from diffpress.serve.batching import PENDING_PREVIEW_BYTES, Finished, Job
from diffpress.serve.errors import RequestError
from diffpress.serve.models import batch_sizes
from diffpress.serve.requests.image_request import ImageRequest, image_request
from diffpress.serve.sampling import StepReport
from diffpress.serve.service import Service
from diffpress.serve.settings import Batching, Limits
from diffpress.serve.web.app import create_app
from tests.serve.conftest import decoded, events, make_service, occupied, post, until

PATH = "/v1/sample"


def status_of(messages: list[dict[str, Any]]) -> int:
    return int(messages[0]["status"])


def body_of(messages: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(b"".join(message.get("body", b"") for message in messages))
    return found


def waiting(service: Service) -> int:
    return len(service.batcher(service.store.named(None))._waiting)


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_batches_have_few_sizes(most: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(most) == sizes


def test_every_request_is_answered_exactly_once(tiny: Path) -> None:
    async def run() -> list[list[dict[str, Any]]]:
        service = make_service(tiny, batching=Batching(8, 5.0, 400))
        app = create_app(service)
        bodies = [
            {"seed": seed, "n": 1 + seed % 3, "steps": 2 + seed % 3, "format": "npy", "stream": seed % 10 == 0}
            for seed in range(120)
        ]
        async with service.running():
            return await asyncio.gather(*(post(app, PATH, body) for body in bodies))

    answers = asyncio.run(run())
    with Pipeline(tiny, "onnxruntime", threads=1) as pipe:
        for seed, messages in enumerate(answers):
            assert [m["type"] for m in messages].count("http.response.start") == 1 and status_of(messages) == 200
            text = b"".join(message.get("body", b"") for message in messages).decode()
            if seed % 10 == 0:
                entries = [data for name, data in events(text) if name == "image"]
                entries.sort(key=lambda entry: entry["index"])
            else:
                entries = json.loads(text)["images"]
            assert [entry["seed"] for entry in entries] == list(range(seed, seed + 1 + seed % 3))
            if seed % 20 == 0:
                found: list[np.ndarray] = []
                pipe(seeds=range(seed, seed + 1 + seed % 3), steps=2 + seed % 3, callback=lambda s: found.append(s.x))  # noqa: B023
                np.testing.assert_array_equal([decoded(entry["data"]) for entry in entries], found[-1])


def test_a_full_queue_answers_429_and_says_when_to_come_back(tiny: Path) -> None:
    async def run() -> None:
        service = make_service(tiny, batching=Batching(4, 0.0, 6))
        app, model = create_app(service), service.store.named(None)
        async with service.running():
            await service.preload()
            with occupied(model):
                running = asyncio.create_task(post(app, PATH, {"n": 4}))  # in a batch, before the busy thread
                await until(lambda: model.users == 1 and waiting(service) == 0)
                queued = [asyncio.create_task(post(app, PATH, {"n": 2, "seed": k})) for k in range(3)]
                await until(lambda: waiting(service) == 6)
                refused = await post(app, PATH, {"n": 1})
                assert status_of(refused) == 429 and body_of(refused)["error"]["code"] == "queue_full"
                assert int(dict(refused[0]["headers"])[b"retry-after"]) >= 1
                assert waiting(service) == 6
            assert {status_of(messages) for messages in await asyncio.gather(running, *queued)} == {200}
            assert status_of(await post(app, PATH, {"n": 6})) == 200, "there is place again"

    asyncio.run(run())


def test_a_deadline_of_a_millisecond_is_answered_504_and_frees_its_place(tiny: Path) -> None:
    async def run() -> None:
        service = make_service(tiny)
        app, model = create_app(service), service.store.named(None)
        async with service.running():
            with occupied(model):
                started = time.monotonic()
                plain, streamed = await asyncio.gather(
                    post(app, PATH, {"n": 3, "deadline_ms": 1}),
                    post(app, PATH, {"n": 3, "deadline_ms": 1, "stream": True}),
                )
                assert time.monotonic() - started < 5
                for messages in (plain, streamed):
                    assert status_of(messages) == 504 and body_of(messages)["error"]["code"] == "deadline_exceeded"
                assert waiting(service) == 0 and service.in_progress == 0
            assert status_of(await post(app, PATH, {})) == 200

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_while_it_waits_frees_its_place(tiny: Path, stream: bool) -> None:
    async def run() -> None:
        service = make_service(tiny, batching=Batching(1, 0.0, 4))
        app, model, gone = create_app(service), service.store.named(None), asyncio.Event()
        async with service.running():
            await service.preload()
            with occupied(model):
                first = asyncio.create_task(post(app, PATH, {}))
                await until(lambda: model.users == 1 and waiting(service) == 0)
                leaving = asyncio.create_task(post(app, PATH, {"n": 4, "stream": stream}, gone))
                await until(lambda: waiting(service) == 4)
                assert status_of(await post(app, PATH, {})) == 429
                gone.set()
                await leaving
                assert waiting(service) == 0 and service.in_progress == 1
                staying = asyncio.create_task(post(app, PATH, {"n": 4}))
                await until(lambda: waiting(service) == 4)
            assert status_of(await first) == 200 and status_of(await staying) == 200
            images = service.metrics.text({}).decode()
            assert 'diffpress_images_total{model="tiny_bundle"} 5.0' in images, "nothing was sampled for who left"

    asyncio.run(run())


def test_a_running_batch_stops_when_all_of_its_clients_have_gone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    async def run() -> None:
        service = make_service(tiny)
        app, gone, model = create_app(service), asyncio.Event(), service.store.named(None)
        async with service.running():
            await service.preload()
            assert model.pipeline is not None
            network, loop = model.pipeline.denoiser, asyncio.get_running_loop()
            run_network = network.run

            def slow(inputs: dict[str, np.ndarray]) -> np.ndarray:
                steps.append(len(steps))
                if len(steps) == 3:
                    loop.call_soon_threadsafe(gone.set)
                time.sleep(0.02)
                return run_network(inputs)

            monkeypatch.setattr(network, "run", slow)
            await post(app, PATH, {"steps": 40}, gone)
            await until(lambda: model.thread._work_queue.empty() and not model.users)

    asyncio.run(run())
    assert 3 <= len(steps) < 30


def test_a_failing_engine_is_answered_500_without_its_message(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        service = make_service(tiny, batching=Batching(2, 5.0, 64))
        app, model = create_app(service), service.store.named(None)
        async with service.running():
            await service.preload()
            assert model.pipeline is not None

            def fail(inputs: dict[str, np.ndarray]) -> np.ndarray:
                raise RuntimeError("/a/path/of/the/server")

            with monkeypatch.context() as patch:
                patch.setattr(model.pipeline.denoiser, "run", fail)
                # a request of more images than one batch is answered once too
                answers = await asyncio.gather(*(post(app, PATH, {"n": n}) for n in (1, 5)))
            for messages in answers:
                assert status_of(messages) == 500 and body_of(messages)["error"]["code"] == "sampling_failed"
                assert "path" not in str(body_of(messages))
            assert waiting(service) == 0 and status_of(await post(app, PATH, {})) == 200

    asyncio.run(run())


def test_the_oldest_waits_no_longer_than_it_has_to(tiny: Path) -> None:
    async def run() -> None:
        service = make_service(tiny, batching=Batching(4, 60_000.0, 64))
        app = create_app(service)
        async with service.running():
            full = await asyncio.gather(*(post(app, PATH, {"seed": seed}) for seed in range(4)))
            assert [body_of(messages)["timing"]["batches"] for messages in full] == [[4]] * 4, "no need to wait"
            alone = asyncio.create_task(post(app, PATH, {}))
            await until(lambda: waiting(service) == 1)
            other = asyncio.create_task(post(app, PATH, {"n": 3, "steps": 3}))  # another plan fills no place
            await until(lambda: waiting(service) == 4)
            await asyncio.sleep(0.1)
            assert waiting(service) == 4
            more = await post(app, PATH, {"n": 3})
            assert status_of(await alone) == 200 and body_of(more)["timing"]["batches"] == [4] * 3
            other.cancel()

    asyncio.run(run())


def test_previews_that_a_client_does_not_read_are_dropped(tiny: Path) -> None:
    async def run() -> None:
        preview = np.zeros(PENDING_PREVIEW_BYTES // 8, np.float32)
        job = Job(request_of(tiny, stream=True))
        for step in range(10):
            job.tell(StepReport(0, step + 1, 10, 1.0, preview))
        job.tell(Finished(0, preview))
        found = [event async for event in job.events()]
        assert [getattr(event, "preview", None) is not None for event in found].count(True) == 3
        assert len(found) == 11 and isinstance(found[-1], Finished)
        assert job._preview_bytes == 0

    asyncio.run(run())


def test_a_cancelled_job_keeps_nothing(tiny: Path) -> None:
    async def run() -> None:
        job = Job(request_of(tiny))
        job.is_cancelled = True
        job.tell(Finished(0, np.zeros(1)))
        job.tell(RequestError(500, "x", "x"))
        assert job._events.empty()

    asyncio.run(run())


def request_of(tiny: Path, **body: Any) -> ImageRequest:
    return image_request(body, make_service(tiny).store.named(None), Limits())
