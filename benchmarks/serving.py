"""The server under load: throughput and latency, memory over many requests, and requests that go wrong.

    python benchmarks/serving.py throughput BUNDLE      concurrent clients, one client, and `sample` in turns
    python benchmarks/serving.py memory BUNDLE          resident memory over many requests: slope and its error
    python benchmarks/serving.py faults BUNDLE          clients that vanish, damaged bodies, deadlines, SIGTERM

Client and server run on the same machine and share its processors. Each command prints one Markdown table row by row.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.runtime.bundle import load_bundle

PROMPTS = ("a red house", "a blue cat on white", "a green tree", "an orange sun")
ROUNDS = 3
TIMEOUT_SECONDS = 120


class Server:
    """A `diffpress serve` process of one bundle, on a free port."""

    def __init__(self, bundle: Path, *words: str) -> None:
        command = [sys.executable, "-m", "diffpress", "serve", f"benchmarked={bundle}", "--port", "0", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self._wait_for("listening")["url"].rstrip("/").rpartition(":")[2])
        self._wait_for("ready")
        self.log: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _wait_for(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found: dict[str, Any] = json.loads(line)
            if found["event"] == event:
                return found
        raise SystemExit(f"the server ended before it was {event}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(json.loads(line))

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_SECONDS)

    def resident_mib(self) -> float:
        """Return the server's resident memory."""
        connection = self.connect()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        match = re.search(r"^process_resident_memory_bytes (\S+)", text, re.M)
        assert match is not None
        return float(match[1]) / 2**20

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_SECONDS)


def post(connection: http.client.HTTPConnection, body: bytes) -> int:
    """Send a request and read all of its response; return the status."""
    connection.request("POST", "/v1/sample", body, {"content-type": "application/json"})
    response = connection.getresponse()
    response.read()
    return response.status


def body_of(kind: str, seed: int) -> dict[str, Any]:
    prompt = {"prompt": PROMPTS[seed % len(PROMPTS)]} if kind == "text" else {}
    return {"seed": seed, **prompt}


def under_load(server: Server, kind: str, clients: int, requests: int) -> tuple[float, list[float]]:
    """Return images per second and the seconds of each request, of clients that ask again when they were answered."""
    seconds: list[float] = []

    def client(number: int) -> None:
        connection = server.connect()
        for seed in range(number, requests, clients):
            body, start = json.dumps(body_of(kind, seed)).encode(), time.perf_counter()
            status = post(connection, body)
            seconds.append(time.perf_counter() - start)
            if status != 200:
                raise SystemExit(f"status {status}")
        connection.close()

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return requests / (time.perf_counter() - start), seconds


def sampled(args: argparse.Namespace, kind: str) -> float:
    """Return the images per second of `diffpress sample` at the same batch size, without loading and writing."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-n", str(args.requests)]
        if kind == "text":
            file = Path(folder) / "prompts.txt"
            file.write_text("\n".join(PROMPTS) + "\n")
            words = ["-n", str(-(-args.requests // len(PROMPTS))), "--prompt-file", str(file)]
        command = [sys.executable, "-m", "diffpress", "sample", str(args.bundle), *words, *engine_words(args)]
        command += ["--batch", str(args.batch), "--out", f"{folder}/images/"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"([\d.]+) ms per", text)
    assert match is not None, text
    return 1e3 / float(match[1])


def engine_words(args: argparse.Namespace) -> list[str]:
    words = ["--threads", str(args.threads)] if args.threads else []
    return [*words, *(["--engine", args.engine] if args.engine else [])]


def throughput(args: argparse.Namespace, kind: str) -> None:
    """Print images per second in turns, medians of the rounds, and latencies under load."""
    server = Server(args.bundle, "--max-batch", str(args.batch), *engine_words(args))
    under_load(server, kind, args.clients, 2 * args.clients)  # the first requests make the plan
    rates: dict[str, list[float]] = {"sample": [], "clients": [], "serial": []}
    latencies: dict[str, list[float]] = {"clients": [], "serial": []}
    for _ in range(ROUNDS):
        rates["sample"].append(sampled(args, kind))
        for name, clients in (("clients", args.clients), ("serial", 1)):
            rate, seconds = under_load(server, kind, clients, args.requests)
            rates[name].append(rate)
            latencies[name] += seconds
    server.stop()
    own, many, one = (statistics.median(rates[name]) for name in ("sample", "clients", "serial"))
    print("| | images per second | of `sample` | p50 ms | p99 ms |\n|---|---|---|---|---|")
    print(f"| `sample --batch {args.batch}` | {own:.1f} | 1.00 | | |")
    for name, what, rate in (("clients", f"{args.clients} clients", many), ("serial", "1 client", one)):
        low, high = np.percentile(latencies[name], [50, 99]) * 1e3
        print(f"| {what} | {rate:.1f} | {rate / own:.2f} | {low:.1f} | {high:.1f} |")
    print(f"\n{args.clients} clients have {many / one:.2f} of the throughput of one; {ROUNDS} rounds, medians")


def memory(args: argparse.Namespace, kind: str) -> None:
    """Print the slope of the resident memory over requests, after a tenth of them."""
    server = Server(args.bundle, "--max-batch", str(args.batch), *engine_words(args))
    part = max(args.requests // 40, args.clients)
    under_load(server, kind, args.clients, max(args.requests // 10, part))
    points = [(0, server.resident_mib())]
    while points[-1][0] < args.requests:
        under_load(server, kind, args.clients, part)
        points.append((points[-1][0] + part, server.resident_mib()))
    server.stop()
    x, y = np.array(points).T
    print(
        "| requests | MiB at first | MiB at last | MiB per 1000 requests | in the second half |\n|---|---|---|---|---|"
    )
    slopes = " | ".join(slope_text(x[half:], y[half:]) for half in (0, len(x) // 2))
    print(f"| {points[-1][0]} | {y[0]:.1f} | {y[-1]:.1f} | {slopes} |")


def slope_text(requests: np.ndarray, mib: np.ndarray) -> str:
    """Return the slope of a line through the points, per 1000 requests, with its standard error."""
    (slope, _), covariance = np.polyfit(requests / 1e3, mib, 1, cov=True)
    return f"{slope:+.3f} ± {float(np.sqrt(covariance[0, 0])):.3f}"


def faults(args: argparse.Namespace, kind: str) -> None:
    """Print how many requests of each kind were answered with which status, SIGTERM in the middle of them."""
    server = Server(args.bundle, "--max-batch", str(args.batch), *engine_words(args))
    answers: Counter[tuple[str, int | str]] = Counter()
    draw = random.Random(0)
    kinds: dict[str, Callable[[int], bytes]] = {
        "valid": lambda seed: json.dumps(body_of(kind, seed)).encode(),
        "deadline of 1 ms": lambda seed: json.dumps({**body_of(kind, seed), "deadline_ms": 1}).encode(),
        "damaged body": lambda seed: json.dumps(body_of(kind, seed)).encode()[: seed % 9] + b"\xff{",
        "too many steps": lambda seed: json.dumps({**body_of(kind, seed), "steps": 10**6}).encode(),
        "too many images": lambda seed: json.dumps({**body_of(kind, seed), "n": 10**6}).encode(),
        "client vanishes": lambda seed: json.dumps({**body_of(kind, seed), "stream": seed % 2 == 0}).encode(),
    }
    order = [draw.choice([*kinds]) for _ in range(args.requests)]
    lock = threading.Lock()
    started = 0

    def ask(seed: int) -> None:
        nonlocal started
        with lock:
            started += 1
            if started == args.requests * 3 // 4:
                server.process.send_signal(signal.SIGTERM)
        name, connection = order[seed], server.connect()
        try:
            if name == "client vanishes":
                connection.request("POST", "/v1/sample", kinds[name](seed), {"content-type": "application/json"})
                answer: int | str = "gone"
            else:
                answer = post(connection, kinds[name](seed))
        except ConnectionRefusedError:
            answer = "refused: the server has ended"
        except ConnectionResetError:
            # a connection that the kernel made in the instant in which the server closed its listening socket
            answer = "reset: the server ended" if started > args.requests * 3 // 4 else "LOST (reset)"
        except (OSError, http.client.HTTPException) as error:
            answer = f"LOST ({type(error).__name__})"
        connection.close()
        answers[name, answer] += 1

    with ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(ask, range(args.requests)))
    code = server.process.wait(TIMEOUT_SECONDS)
    print("| request | answer | count |\n|---|---|---|")
    for (name, answer), count in sorted(answers.items(), key=str):
        print(f"| {name} | {answer} | {count} |")
    logged = Counter(line["status"] for line in server.log if line["event"] == "request")
    print(f"\n{sum(answers.values())} requests, exit code {code}; the server's log has {dict(sorted(logged.items()))}")
    failed = any(str(answer).startswith(("LOST", "5")) and answer not in (503, 504) for _, answer in answers)
    if failed or code or any("traceback" in line for line in server.log):
        raise SystemExit("FAIL: a request was lost, failed, or left a traceback")


COMMANDS = {"throughput": (throughput, 200), "memory": (memory, 10_000), "faults": (faults, 1000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, help="(200, 10000 or 1000)")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--engine")
    args = parser.parse_args()
    run, requests = COMMANDS[args.command]
    args.requests = args.requests or requests
    run(args, load_bundle(args.bundle).spec.conditioning.kind)


if __name__ == "__main__":
    main()
