"""`diffpress serve` as a process: real sockets, OpenAI's own client, clients that vanish, and signals."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from diffpress.cli.main import main
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.pipeline import Pipeline
from diffpress.serve.server import Address
from diffpress.serve.settings import API_KEY_VARIABLE, access_for

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef"


class Server:
    """A server process and its log."""

    def __init__(self, *words: object, **environment: str) -> None:
        command = [sys.executable, "-m", "diffpress", "serve", *map(str, words), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(
            [*command, "--engine", "onnxruntime"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = str(self.event("listening")["url"])
        self.event("ready")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def event(self, name: str, seconds: float = 60.0) -> dict[str, Any]:
        """Wait for an event in the log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self.lines:
                if line["event"] == name:
                    return line
            assert self.process.poll() is None or self._reader.is_alive(), self.process.communicate()[1]
            time.sleep(0.01)
        raise AssertionError(f"no {name} in {self.lines}")

    def stop(self) -> int:
        """End the process and return its exit code."""
        assert self.process.stdout is not None and self.process.stderr is not None
        if self.process.stdout.closed:
            return int(self.process.returncode)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(10)
        assert self.process.stderr.read() == ""
        self.process.stderr.close()
        self.process.stdout.close()
        return code


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def start(*words: object, **environment: str) -> Server:
            server = Server(*words, **environment)
            stack.callback(server.stop)
            return server

        yield start


def metrics(server: Server) -> dict[str, float]:
    lines = httpx2.get(f"{server.url}metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_the_official_client_gets_images(tiny: Path, serve: Callable[..., Server]) -> None:
    server = serve(f"small={tiny}", **{API_KEY_VARIABLE: KEY})
    with openai.OpenAI(base_url=f"{server.url}v1", api_key=KEY) as client:
        assert [model.id for model in client.models.list()] == ["small"]
        assert client.models.retrieve("small").owned_by == "diffpress"
        found = client.images.generate(
            model="small", prompt="", n=2, size="8x8", response_format="b64_json", extra_body={"seed": 3, "labels": 1}
        )
        assert found.data is not None
        with Pipeline(tiny, "onnxruntime", threads=1) as pipe:
            expected = pipe(labels=1, seeds=[3, 4])
        for image, pil in zip(found.data, expected, strict=True):
            shown = Image.open(io.BytesIO(base64.b64decode(image.b64_json or "")))
            np.testing.assert_array_equal(np.asarray(shown), np.asarray(pil))
        with pytest.raises(openai.BadRequestError, match="images are not stored here"):
            client.images.generate(prompt="", response_format="url")
        with pytest.raises(openai.NotFoundError, match="takes no input images"):
            client.images.edit(image=b"x", prompt="")
        with pytest.raises(openai.NotFoundError, match="did you mean 'small'"):
            client.images.generate(model="smal", prompt="")
    with (
        openai.OpenAI(base_url=f"{server.url}v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    assert server.stop() == 0


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(tiny: Path, serve: Callable[..., Server]) -> None:
    server = serve(tiny, "--max-batch", 2, "--max-queue", 500, "--max-wait-ms", 100)
    statuses: list[int | str] = []
    stopped = threading.Event()

    def ask(seed: int) -> None:
        if seed >= 40:
            assert stopped.wait(30)
        try:
            body = {"seed": seed, "n": 3, "steps": 2 + seed % 40}
            statuses.append(httpx2.post(f"{server.url}v1/sample", json=body, timeout=60).status_code)
        except httpx2.ConnectError:
            statuses.append("closed")

    with ThreadPoolExecutor(60) as pool:
        work = [pool.submit(ask, seed) for seed in range(60)]
        while len(statuses) < 2:
            time.sleep(0.002)
        server.process.send_signal(signal.SIGTERM)
        server.event("draining")
        stopped.set()
        for each in work:
            each.result()
    assert server.stop() == 0
    assert len(statuses) == 60 and {200, 503} <= set(statuses) <= {200, 503, "closed"}
    logged = [line for line in server.lines if line["event"] == "request"]
    assert sum(line["status"] == 200 for line in logged) == statuses.count(200) >= 2
    assert server.event("draining")["requests"] > 0, "the signal came in the middle"


def test_clients_that_vanish_free_their_place(tiny: Path, serve: Callable[..., Server]) -> None:
    server = serve(tiny, "--max-batch", 8, "--max-wait-ms", 60_000, "--max-queue", 9)
    host, port = server.url.removeprefix("http://").rstrip("/").split(":")
    body = b'{"n": 3, "stream": true}'
    head = "POST /v1/sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    start = f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(3):  # nine places are full of clients that wait
        sockets = [socket.create_connection((host, int(port))) for _ in range(3)]
        for connection in sockets[:2]:
            connection.sendall(start + body)
        sockets[2].sendall(start + body[:5])  # in the middle of its body
        _until(lambda: metrics(server)['diffpress_waiting_images{model="tiny_bundle"}'] == 6)
        for connection in sockets:
            connection.close()
        _until(lambda: metrics(server)['diffpress_waiting_images{model="tiny_bundle"}'] == 0)
    assert httpx2.post(f"{server.url}v1/sample", json={"n": 8}, timeout=60).status_code == 200
    found = metrics(server)
    assert found['diffpress_images_total{model="tiny_bundle"}'] == 8 and found["diffpress_requests_in_progress"] == 0


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_torch_is_not_imported(tiny: Path) -> None:
    code = "import diffpress.cli.serve, diffpress.serve.server, sys; print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'diffpress.serve.batching'" in done.stdout
    for name in ("torch", "diffusers", "onnx", "diffpress.compress.checkpoint", "diffpress.export"):
        assert f"'{name}'" not in done.stdout


def test_a_missing_extra_is_named(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("diffpress.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(tiny)]) == 2
    assert "needs the package 'uvicorn': pip install 'diffpress[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: not a bundle"),
        (["TINY", "TINY"], "each needs a name of its own"),
        (["a=TINY", "default=TINY"], "NAME is not 'default'"),
        (["TINY", "--host", "0.0.0.0"], "an API key is needed; set DIFFPRESS_API_KEY or give --api-key-file"),
        (["TINY", "--host", "192.0.2.1"], "an API key is needed"),
        (["TINY", "--port", "70000"], "--port 70000: must lie in 0..65535"),
        (["TINY", "--max-batch", "0"], "must be at least 1"),
        (["TINY", "--max-wait-ms", "nan"], "must be at least 1, the time 0 to 60000"),
        (["TINY", "--max-steps", "0"], "limit of steps 0: must be above 0"),
        (["TINY", "--memory-budget-mib", "-1"], "--memory-budget-mib -1: must be a number above 0"),
        (["TINY", "--memory-budget-mib", "0.001"], "more than the memory budget"),
        (["TINY", "--drain-seconds", "-1"], "--drain-seconds -1.0: must not be negative"),
        (["TINY", "--api-key-file", "nowhere"], "--api-key-file nowhere: not readable"),
        (["TINY", "--engine", "nothing"], "unknown engine 'nothing'"),
    ],
)
def test_bad_arguments_are_one_line(
    words: list[str], message: str, tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    port = [] if "--port" in words else ["--port", "0"]
    assert main(["serve", *(word.replace("TINY", str(tiny)) for word in words), *port]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("diffpress: ")


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInputError, match=f"--host 127.0.0.1 --port {port}: cannot listen there"):
            Address(port=port).listen()


def test_the_key_is_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "x" * 16)
    assert access_for("0.0.0.0", (), (), None).api_key == "x" * 16
    (tmp_path / "key").write_text(f"{KEY}\n")
    access = access_for("192.0.2.1", ("Example.org",), (), tmp_path / "key")
    assert access.api_key == KEY and {"192.0.2.1", "example.org", "localhost"} <= set(access.hosts)
    assert KEY not in repr(access)
    for text in ("short", "", "a key with \t a tab in it", "ä" * 20):
        (tmp_path / "key").write_text(text)
        with pytest.raises(InvalidInputError, match="at least 16 printable ASCII characters"):
            access_for("127.0.0.1", (), (), tmp_path / "key")
    monkeypatch.delenv(API_KEY_VARIABLE)
    assert access_for("127.0.0.1", (), (), None).api_key is None and access_for("::1", (), (), None).api_key is None


def test_a_refusal_arrives_although_the_body_comes_after_it(tiny: Path, serve: Callable[..., Server]) -> None:
    server = serve(tiny, "--max-body", 1000)
    host, port = server.url.removeprefix("http://").rstrip("/").split(":")
    for head, status in (
        ("POST /v1/sample HTTP/1.1\r\nHost: example.org\r\nContent-Type: application/json", 421),
        ("POST /v1/sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain", 415),
        ("POST /v1/sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json", 413),
        ("POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data", 404),
    ):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(f"{head}\r\nConnection: close\r\nContent-Length: 300000\r\n\r\n".encode())
            for _ in range(30):
                time.sleep(0.005)
                connection.sendall(b"x" * 10_000)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and b'"error"' in answer
