"""Several commands at the same time on one folder, one output file or one cache: each succeeds or is refused in a line.

compress    two runs on one folder: one goes on, the other is refused, and the bundle is that of a run alone
export      two exports into one folder: the bundle of one of them, whole
sample      several processes write one image, which is always whole
cache       several processes open a bundle with an empty cache, or one of which an entry is damaged
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from diffpress.runtime.bundle import load_bundle
from tests.campaign.result import Result
from tests.campaign.states import half_written, is_temporary
from tests.campaign.worker import ROOT
from tests.campaign.workload import compress_words, make_project, result_of

TINY = ROOT / "tests" / "runtime" / "tiny_bundle"
PROCESSES = 4


def run(minutes: float, seed: int) -> Result:
    """Repeat all parts with other delays between the processes until the time is over, at least once."""
    result, rng, end = Result(), random.Random(seed), time.monotonic() + minutes * 60
    with tempfile.TemporaryDirectory(prefix="parallel-") as name:
        trials = Trials(make_project(Path(name)), result, rng)
        parts: list[Callable[[], None]] = [trials.cache, trials.sample, trials.export, trials.compress]
        for number in range(1000):
            parts[number % len(parts)]()
            if time.monotonic() > end and number + 1 >= len(parts):
                break
    return result


class Trials:
    """Commands that run at the same time in one project."""

    def __init__(self, project: Path, result: Result, rng: random.Random) -> None:
        self.project, self.result, self.rng = project, result, rng
        self.expected: dict[str, str] = {}

    def compress(self) -> None:
        """Two runs on one folder, and a third after them."""
        out, alone = self.project / "run", self.project / "alone"
        if not self.expected:
            self._together([compress_words(self.project, "light", alone)])
            self.expected = result_of(alone)
        shutil.rmtree(out, ignore_errors=True)
        words = compress_words(self.project, "light", out)
        ended = self._together([words, words])
        problems = _ends(ended, "another command is writing here")
        ended = self._together([words])
        problems += _ends(ended)
        if not problems and result_of(out) != self.expected:
            problems.append("another result than a run alone")
        self.result.trial("two compress runs on one folder", problems + _left(out))

    def export(self) -> None:
        """Two exports into one folder."""
        out = self.project / "exported"
        words = ["export", str(self.project / "teacher"), "--out", str(out), "--targets", "onnx", "--threads", "1"]
        ended = self._together([words, words])
        problems = _ends(ended, "another command is writing here")
        if not problems:
            load_bundle(out)
        self.result.trial("two exports into one folder", problems + _left(self.project))

    def sample(self) -> None:
        """Several processes write one image."""
        folder = self.project / "images"
        folder.mkdir(exist_ok=True)
        words = ["sample", str(TINY), "--engine", "onnxruntime", "-n", "16", "--out", str(folder / "x.png")]
        ended = self._together([words] * PROCESSES)
        self.result.trial("several processes write one image", _ends(ended) + half_written(folder) + _left(folder))

    def cache(self) -> None:
        """Several processes fill one cache; then one entry is damaged."""
        folder = self.project / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(2):
            ended = self._together(
                [["sample", str(TINY), "--engine", "openvino", "-n", "4", "--out", str(self.project / f"{k}.npy")]
                 for k in range(PROCESSES)]
            )  # fmt: skip
            problems = _ends(ended) + _left(folder)
            arrays = {(self.project / f"{k}.npy").read_bytes() for k in range(PROCESSES)}
            problems += ["the processes' samples differ"] * (len(arrays) > 1)
            self.result.trial("several processes share a cache", problems)
            for entry in sorted(folder.glob("*.compiled"))[:1]:
                data = bytearray(entry.read_bytes())
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                entry.write_bytes(data)

    def _together(self, commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
        """Run commands at the same time, up to some seconds apart; return exit codes and stderr."""
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DIFFPRESS_CACHE": str(self.project / "cache"),
        }  # fmt: skip
        started = []
        for words in commands:
            process = subprocess.Popen(
                [sys.executable, "-m", "diffpress", *words],
                cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            started.append(process)
            time.sleep(self.rng.expovariate(2) if len(commands) > 1 else 0)
        return [(process.returncode, error) for process in started for error in [process.communicate()[1]]]


def _ends(ended: Sequence[tuple[int, str]], refusal: str | None = None) -> list[str]:
    """Return what is wrong: each ends with 0, all but one with 2 and the refusal, nobody with a traceback."""
    wrong = [
        f"ended with {code}: {error.strip()[-300:]}"
        for code, error in ended
        if "Traceback" in error or not (code == 0 or (code == 2 and refusal is not None and refusal in error))
    ]
    return wrong + ["nobody succeeded"] * all(code != 0 for code, _ in ended)


def _left(folder: Path) -> list[str]:
    return [f"left over: {path.name}" for path in folder.rglob(".*") if is_temporary(path.relative_to(folder))]
