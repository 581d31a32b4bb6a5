"""Services of the tiny bundle in this process, a client for each, and ASGI requests whose client goes away."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.pipeline import Pipeline
from diffpress.serve.models import Model, Source
from diffpress.serve.service import Service, Settings
from diffpress.serve.web.app import create_app
from tests.runtime.conftest import temporary_cache, tiny  # noqa: F401

ENGINE, OPTIONS = "onnxruntime", EngineOptions(threads=1)
LOCAL = "http://localhost"
POST_SECONDS = 30.0


def make_service(*bundles: Path | Source, **settings: Any) -> Service:
    """Return a service of these bundles in ONNX Runtime."""
    chosen = Settings(**settings)
    sources = [bundle if isinstance(bundle, Source) else Source(bundle) for bundle in bundles]
    models = [Model(source._replace(engine=ENGINE), OPTIONS, chosen.batching.images) for source in sources]
    return Service(models, chosen)


@pytest.fixture
def client_of() -> Iterator[Callable[[Service], TestClient]]:
    """Return a client of a service, which runs until the test ends."""
    with ExitStack() as stack:
        yield lambda service: stack.enter_context(
            TestClient(create_app(service), base_url=LOCAL, raise_server_exceptions=False)
        )


@pytest.fixture
def client(tiny: Path, client_of: Callable[[Service], TestClient]) -> TestClient:  # noqa: F811
    """Return a client of the tiny bundle."""
    return client_of(make_service(tiny))


@pytest.fixture
def tiny_pipeline(tiny: Path) -> Iterator[Pipeline]:  # noqa: F811
    with Pipeline(tiny, ENGINE, options=OPTIONS) as pipeline:
        yield pipeline


@contextmanager
def occupied(model: Model) -> Iterator[None]:
    """Keep the model's thread busy, so that nothing is sampled inside the block."""
    started, free = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        assert free.wait(60)

    task = model.thread.submit(wait)
    assert started.wait(60)
    try:
        yield
    finally:
        free.set()
        task.result()


def arrays(response: Any) -> list[np.ndarray]:
    """Return the samples of a response of /v1/sample with format npy."""
    assert response.status_code == 200, response.text
    return [decoded(image["data"]) for image in response.json()["images"]]


def decoded(data: str) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(base64.b64decode(data)), allow_pickle=False)
    return array


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse server-sent events."""
    found = []
    for part in text.strip().split("\n\n"):
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def scope_of(path: str) -> dict[str, Any]:
    """Return the ASGI scope of a JSON POST request."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("localhost", 80), "state": {},
    }  # fmt: skip


async def post(app: Any, path: str, body: dict[str, Any], gone: asyncio.Event | None = None) -> list[dict[str, Any]]:
    """Send an ASGI request whose client goes away when `gone` is set, and return the messages it was answered with."""
    sent: list[dict[str, Any]] = []
    unread = [json.dumps(body).encode()]

    async def receive() -> dict[str, Any]:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with asyncio.timeout(POST_SECONDS):
        await app(scope_of(path), receive, send)
    return sent


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a condition holds; fail if it takes too long."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
