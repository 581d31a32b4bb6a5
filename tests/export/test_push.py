"""export/push.py: what arrives on a hub, played by a server in this process that speaks the hub's own protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffpress.runtime.bundle import load_bundle

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "runtime" / "tiny_bundle"
TOKEN = "hf_testing"


class FakeHub(ThreadingHTTPServer):
    """Keeps the files of one repository; files that end in .onnx are uploaded by LFS."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.created: list[dict[str, object]] = []
        self.is_read_only = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        return None

    def do_GET(self) -> None:
        self.reply(404, {"error": "not here"})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.reply(200, {})

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid username or password."})
        elif self.server.is_read_only:
            self.reply(403, {"error": "You don't have the rights to create a model under the namespace"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply(200, {"url": f"{self.server.address}/owner/name", "name": "owner/name", "id": "1"})
        elif "/preupload/" in self.path:
            found = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".onnx") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.reply(200, {"files": found})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.server.address}/upload/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.decode().splitlines()])
            self.reply(200, {"commitUrl": f"{self.server.address}/owner/name/commit/1", "commitOid": "1"})
        else:
            self.reply(404, {"error": "not here"})

    def commit(self, lines: list[dict[str, object]]) -> None:
        for line in lines:
            value = line["value"]
            assert isinstance(value, dict)
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, content: dict[str, object]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(hub: FakeHub, home: Path, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run `diffpress push` in a process of its own: the hub client reads its address when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": token,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "diffpress", "push", *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_the_files_on_the_hub_are_a_bundle(hub: FakeHub, tmp_path: Path) -> None:
    done = push(hub, tmp_path, str(TINY), "owner/name", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/owner/name/commit/1")
    assert hub.created[0]["visibility"] == "private"
    for name, content in hub.files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    assert load_bundle(tmp_path / "back").hash == load_bundle(TINY).hash
    uploaded = {hashlib.sha256(content).hexdigest() for content in hub.objects.values()}
    assert uploaded == hub.objects.keys() != set()


@pytest.mark.parametrize(
    ("words", "token", "expected"),
    [
        ((str(TINY), "not a name"), TOKEN, "OWNER/NAME"),
        ((str(TINY), "owner/name"), "hf_wrong", "owner/name"),
        (("nowhere", "owner/name"), TOKEN, "nowhere: not a bundle"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: FakeHub, tmp_path: Path, words: tuple[str, ...], token: str, expected: str
) -> None:
    done = push(hub, tmp_path, *words, token=token)
    assert done.returncode == 2 and not hub.files
    assert len(done.stderr.strip().splitlines()) == 1 and expected in done.stderr, done.stderr


def test_a_repository_of_somebody_else_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.is_read_only = True
    done = push(hub, tmp_path, str(TINY), "owner/name")
    assert done.returncode == 2 and not hub.files
    assert "permission" in done.stderr and "Traceback" not in done.stderr, done.stderr
