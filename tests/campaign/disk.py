"""Machines without enough of something: each verb ends with one line and exit code 2, and the next call succeeds.

1. A disk that is full from the k-th change of a file on, for every k (fault_points.c), and for one change alone.
2. Folders that are read-only, and a small disk that is really full (both need root, to mount a tmpfs).
3. Limits of memory and of the size of a file (RLIMIT_AS, RLIMIT_FSIZE).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.campaign.result import Result
from tests.campaign.states import half_written, is_temporary
from tests.campaign.worker import ROOT, Ended, Worker
from tests.campaign.workload import compress_words, make_project

TINY = ROOT / "tests" / "runtime" / "tiny_bundle"
MIB = 2**20


@dataclass(frozen=True)
class Command:
    """One verb: its words, the folder that it writes to, and the files that its result consists of."""

    name: str
    words: tuple[str, ...]
    results: tuple[str, ...]


def commands(project: Path, out: Path) -> list[Command]:
    """Return the commands that write files; `report` needs the folder of a run, `run`, in `project`."""
    sample, run = ("sample", str(TINY), "--engine", "onnxruntime", "--threads", "1", "-n", "2"), project / "run"
    return [
        Command("sample to an image", (*sample, "--out", str(out / "x.png")), ("x.png",)),
        Command("sample to a folder", (*sample, "--out", f"{out}/images/"), ("images",)),
        Command("sample to an array", (*sample, "--out", str(out / "x.npz")), ("x.npz",)),
        Command("sample in openvino", (*sample[:3], "openvino", *sample[4:], "--out", str(out / "x.png")), ("x.png",)),
        Command("init", ("init", "quick", "--out", str(out / "r.yaml")), ("r.yaml",)),
        Command("schema", ("schema", "--out", str(out / "s.json")), ("s.json",)),
        Command("cache", ("cache", "info"), ()),
        Command(
            "plan",
            ("plan", str(project / "teacher"), "--recipe", str(project / "light.yaml"), "--json", str(out / "p.json")),
            ("p.json",),
        ),
        Command("report", ("report", str(run)), ()),
        Command("report of two", ("report", str(run), str(run), "--out", str(out / "c.html")), ("c.html",)),
        Command(
            "bench",
            ("bench", str(run), "--engine", "onnxruntime", "--threads", "1", "--batch", "1", "--repeats", "1",
             "--json", str(out / "b.json")),
            ("b.json",),
        ),
        Command(
            "evaluate",
            ("evaluate", str(run / "bundle"), "--engine", "onnxruntime", "--samples", "8", "--seeds", "1",
             "--features", str(project / "features.onnx"), "--reference", str(project / "images.npz"),
             "--json", str(out / "e.json")),
            ("e.json",),
        ),
        Command(
            "export",
            ("export", str(project / "teacher"), "--out", str(out / "bundle"), "--targets", "onnx", "openvino",
             "--threads", "1"),
            ("bundle",),
        ),
        Command("compress", tuple(compress_words(project, "light", out / "run")), ("run",)),
    ]  # fmt: skip


def run(minutes: float, seed: int) -> Result:
    """Run all parts; the changes of files are drawn at random until the time is over."""
    result, rng, end = Result(), random.Random(seed), time.monotonic() + minutes * 60
    with tempfile.TemporaryDirectory(prefix="disk-") as name, Worker() as worker:
        trials = Trials(worker, make_project(Path(name)), result)
        ended = worker.run(compress_words(trials.project, "light", trials.project / "run"), env=trials.env)
        assert ended.code == 0, ended.stderr
        trials.read_only()
        trials.real_full_disk()
        trials.limits()
        trials.every_write(rng, end)
    return result


class Trials:
    """Runs of the commands in a project."""

    def __init__(self, worker: Worker, project: Path, result: Result) -> None:
        self.worker, self.project, self.result = worker, project, result
        self.out, self.tmp = project / "out", project / "tmp"
        self.tmp.mkdir()
        self.env = {"DIFFPRESS_CACHE": str(project / "cache"), "TMPDIR": str(self.tmp)}
        self.commands = commands(project, self.out)

    def every_write(self, rng: random.Random, end: float) -> None:
        """Let each change of a file fail, and in other trials all from it on."""
        counts = {command: self._clean(command).points for command in self.commands}
        points = [
            (command, point, fault)
            for command, count in counts.items()
            for point in range(1, count + 1)
            for fault in ("full_disk", "enospc_once")
        ]
        rng.shuffle(points)
        points.sort(key=lambda one: one[0].name in ("compress", "export"))  # the short commands completely
        tried = 0
        for command, point, fault in points:
            if time.monotonic() > end:
                break
            self._reset()
            ended = self.worker.run(command.words, fault=fault, at=point, env=self.env)
            self._judge(f"{command.name}, {fault} at change {point}", command, ended)
            tried += 1
        described = ", ".join(f"{command.name} {count}" for command, count in counts.items())
        self.result.notes.append(f"full disk at {tried} of {len(points)} changes of files; by command: {described}")

    def read_only(self) -> None:
        """Make the output folder, the cache and the temporary folder read-only, one at a time and together."""
        for places in (("out",), ("cache",), ("tmp",), ("out", "cache", "tmp")):
            for command in self.commands:
                self._reset()
                with contextlib.ExitStack() as stack:
                    for place in places:
                        stack.enter_context(_mounted(self.project / place, "size=1m", read_only=True))
                    ended = self.worker.run(command.words, env=self.env)
                self._judge(
                    f"{command.name}, read-only {' and '.join(places)}", command, ended, again=places == ("out",)
                )

    def real_full_disk(self) -> None:
        """Write to file systems of a few sizes, from too small for anything to nearly enough."""
        for size in (4, 64, 256, 1024):
            for command in self.commands:
                self._reset()
                with _mounted(self.out, f"size={size}k"), _mounted(self.tmp, f"size={size}k"):
                    ended = self.worker.run(command.words, env=self.env)
                    left = half_written(self.out)
                self.result.trial(f"{command.name} on a disk of {size} KiB", [*ended.problems(0, 2), *left])

    def limits(self) -> None:
        """Limit the address space and the size of a file."""
        used = _address_space()
        for command in self.commands:
            for name, limit in (("memory", used + 8 * MIB), ("memory", used + 64 * MIB), ("file_size", 1024),
                                ("file_size", 64 * 1024), ("files", 24)):  # fmt: skip
                self._reset()
                ended = self.worker.run(command.words, limits={name: limit}, env=self.env)
                self._judge(f"{command.name}, {name} limited to {limit}", command, ended, again=False)

    def _judge(self, name: str, command: Command, ended: Ended, again: bool = True) -> None:
        """Count a trial: 0 with a whole result, or 2 and a line; afterwards the same command succeeds."""
        problems = ended.problems(0, 2)
        if ended.code == 2 and len(ended.stderr.strip().splitlines()) > 1 + ended.stderr.count("warning:"):
            problems.append(f"more than one line: {ended.stderr.strip()[-300:]}")
        if self.out.exists():
            problems += half_written(self.out)
        if ended.code == 0:
            problems += [f"{file} is missing" for file in command.results if not (self.out / file).exists()]
        elif again and not problems:
            problems += [f"again: {problem}" for problem in self.worker.run(command.words, env=self.env).problems(0)]
            problems += [f"left over: {p.name}" for p in self.project.rglob(".*") if is_temporary(Path(p.name))]
        self.result.trial(name, problems)

    def _clean(self, command: Command) -> Ended:
        self._reset()
        ended = self.worker.run(command.words, at=1, env=self.env)
        assert ended.code == 0, f"{command.name}: {ended.stderr}"
        return ended

    def _reset(self) -> None:
        for place in (self.out, self.project / "cache", self.tmp):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()


@contextlib.contextmanager
def _mounted(folder: Path, options: str, read_only: bool = False) -> Iterator[None]:
    """Mount an empty tmpfs on a folder; does nothing where that is not allowed."""
    words = ["mount", "-t", "tmpfs", "-o", options + (",ro" if read_only else ""), "none", str(folder)]
    mounted = sys.platform == "linux" and os.geteuid() == 0 and subprocess.run(words, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def _address_space() -> int:
    """Return the bytes of address space of a process that has imported everything."""
    program = "import diffpress.export.run, openvino; print(open('/proc/self/statm').read().split()[0])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return int(ended.stdout.split()[-1]) * os.sysconf("SC_PAGE_SIZE")
