"""Long runs: memory, open files and threads of one process do not grow with the number of samples or loads.

Each part runs in a process of its own, which notes its resident memory, descriptors and threads at regular intervals:

    samples   many batches from one pipeline      loads   open a bundle, sample once, close it
    threads   many threads share one pipeline; every sample equals that of a single thread
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from diffpress.runtime.pipeline import Pipeline
from tests.campaign.result import Result
from tests.campaign.worker import ROOT

TINY = ROOT / "tests" / "runtime" / "tiny_bundle"
ENGINES = ("onnxruntime", "openvino")
TARGETS = {"samples": 100_000, "loads": 10_000, "threads": 20_000}  # where the time allows
SHARES = {"samples": 0.25, "loads": 0.5, "threads": 0.25}  # of the time
THREADS = 16
NOTES = 24  # measurements of a part; the first third is warm-up
GROWTH_KIB = 4096  # of resident memory after the warm-up that counts as flat, of about 150 MiB


def run(minutes: float, seed: int) -> Result:
    """Run every part in both engines."""
    result = Result()
    for engine in ENGINES:
        for part, share in SHARES.items():
            seconds = minutes * 60 * share / len(ENGINES)
            words = [sys.executable, "-m", "tests.campaign.soak", part, engine, str(seconds), str(seed)]
            ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
            if ended.returncode:
                result.trial(f"{part} in {engine}", [ended.stderr.strip()[-300:] or f"ended with {ended.returncode}"])
                continue
            facts = json.loads(ended.stdout.splitlines()[-1])
            result.trial(f"{part} in {engine}", _growth(facts["notes"]) + facts["wrong"])
            result.notes.append(f"{engine}: {_described(part, facts)}")
    return result


def _growth(notes: list[list[int]]) -> list[str]:
    """Return what grew after the warm-up: resident memory in KiB, descriptors, threads."""
    first, last = notes[len(notes) // 3], notes[-1]
    limits = {"resident memory": GROWTH_KIB, "open files": 0, "threads": 0}
    return [
        f"{what} grew from {before} to {after}"
        for (what, limit), before, after in zip(limits.items(), first[1:], last[1:], strict=True)
        if after - before > limit
    ]


def _described(part: str, facts: dict[str, list[list[int]]]) -> str:
    first, last = facts["notes"][len(facts["notes"]) // 3], facts["notes"][-1]
    count = last[0]
    slope = (last[1] - first[1]) / max(1, last[0] - first[0]) * 1000
    return (
        f"{part}: {count} (goal {TARGETS[part]}), memory {first[1] // 1024} -> {last[1] // 1024} MiB "
        f"({slope:+.1f} KiB per 1000), files {first[2]} -> {last[2]}, threads {first[3]} -> {last[3]}"
    )


# --- in a process of its own -------------------------------------------------------------------------------------


class Notes:
    """Measurements [count, KiB resident, descriptors, threads], taken at equal intervals of time or of the target."""

    def __init__(self, part: str, seconds: float) -> None:
        self.target, self.count, self.notes = TARGETS[part], 0, list[list[int]]()
        self._began, self._seconds = time.monotonic(), seconds

    def add(self, count: int) -> bool:
        """Count operations; return whether to go on."""
        self.count += count
        share = max(self.count / self.target, (time.monotonic() - self._began) / self._seconds)
        if share * NOTES >= len(self.notes):
            held = [len([*Path(f"/proc/self/{kind}").iterdir()]) for kind in ("fd", "task")]  # native threads too
            self.notes.append([self.count, _resident_kib(), *held])
        return share < 1.0


def _resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def samples(engine: str, notes: Notes, rng: random.Random) -> list[str]:
    """Sample batches of two sizes under three plans from one pipeline."""
    with Pipeline(TINY, engine, threads=1) as pipe:
        going = True
        while going:
            start, count = rng.randrange(2**40), 128 * rng.randint(1, 8)
            pipe(seeds=range(start, start + count), batch=rng.choice((64, 128)), steps=rng.randint(1, 3))
            going = notes.add(count)
    return []


def loads(engine: str, notes: Notes, rng: random.Random) -> list[str]:
    """Open the bundle, sample once, close it."""
    while True:
        with Pipeline(TINY, engine, threads=1) as pipe:
            pipe(seeds=rng.randrange(100), steps=1)
        if not notes.add(1):
            return []


def threads(engine: str, notes: Notes, rng: random.Random) -> list[str]:
    """Share one pipeline between threads; each image equals the one that a single thread makes."""
    wrong: list[str] = []
    with Pipeline(TINY, engine, threads=1) as alone:
        expected = [np.asarray(image) for image in alone(seeds=range(64), labels=1, batch=1, steps=2)]
    with Pipeline(TINY, engine, threads=1) as pipe, ThreadPoolExecutor(THREADS) as pool:

        def once(number: int) -> None:
            start = number % 60
            found = pipe(seeds=range(start, start + 4), labels=1, batch=1, steps=2)
            for offset, image in enumerate(found):
                if not np.array_equal(np.asarray(image), expected[start + offset]):
                    wrong.append(f"seed {start + offset} gave another image")

        going = True
        while going:
            list(pool.map(once, [rng.randrange(1000) for _ in range(4 * THREADS)]))
            going = notes.add(4 * THREADS * 4)
    return wrong[:3]


PARTS: dict[str, Callable[[str, Notes, random.Random], list[str]]] = {
    "samples": samples,
    "loads": loads,
    "threads": threads,
}

if __name__ == "__main__":
    part, engine, seconds, seed = sys.argv[1:]
    notes = Notes(part, float(seconds))
    wrong = PARTS[part](engine, notes, random.Random(int(seed)))
    sys.stdout.write(json.dumps({"notes": notes.notes, "wrong": wrong}) + "\n")
