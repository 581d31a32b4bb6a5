"""SIGKILL: a run that is killed and started again ends with the bundle of an undisturbed run.

1. Every write: one run of the short recipe, whose folder is copied before each change of a file (fault_points.c), which are all states that
   a SIGKILL can leave. In each, every file that has its final name is whole. Of the states that differ in such files,
   as many as the time allows are resumed.
2. Torn writes: SIGKILL in the middle of a write, at points drawn at random, then resumed.
3. Random moments: runs of the recipes that have every kind of stage are killed again and again until they end.

A measured latency decides which graph an engine runs. Each run therefore starts with the latency.json of the
undisturbed one.
"""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.campaign.result import Result
from tests.campaign.states import half_written, is_temporary, lasting_state
from tests.campaign.worker import Worker
from tests.campaign.workload import FEW_STEPS, compress_words, make_project, result_of

RECORDED = ("recipe.json", "inputs.json", "latency.json")


def run(minutes: float, seed: int) -> Result:
    """Run the three parts, each for a third of the time, which the undisturbed runs are not counted in."""
    result, rng = Result(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kill-") as name, Worker() as worker:
        trials = Trials(worker, make_project(Path(name)), result, rng)
        kinds = list(FEW_STEPS)
        rng.shuffle(kinds)
        trials.every_write("light", minutes * 60 / 3)
        trials.torn_writes("light", minutes * 60 / 3)
        trials.random_moments(kinds, minutes * 60 / 3)
    return result


class Trials:
    """Runs of one project, compared with undisturbed ones."""

    def __init__(self, worker: Worker, project: Path, result: Result, rng: random.Random) -> None:
        self.worker, self.project, self.result, self.rng = worker, project, result, rng
        self.env = {"DIFFPRESS_CACHE": str(project / "cache")}
        self._undisturbed: dict[str, dict[str, str]] = {}

    def every_write(self, kind: str, seconds: float) -> None:
        """Check all states between two changes of a file, and resume as many different ones as time allows."""
        out, copies = self._started(kind, "every-write"), self.project / "copies"
        copies.mkdir()
        ended = self.worker.run(
            self._words(kind, out), fault="snapshot", snapshots=(out, copies), env=self.env, timeout=1200
        )
        assert ended.code == 0, ended.stderr
        groups: dict[str, list[Path]] = {}
        for copy in sorted(copies.iterdir()):
            groups.setdefault(lasting_state(copy), []).append(copy)
        for members in groups.values():
            problems = half_written(members[0])
            for copy in members:
                self.result.trial(f"state {copy.name} of {kind}", problems)
        chosen = [members[-1] for members in groups.values()]  # with the most temporary files
        self.rng.shuffle(chosen)
        resumed = 0
        for copy in _until(seconds, chosen):
            problems = self._resumed(kind, copy, out)
            resumed += self.result.trial(f"resumed from state {copy.name} of {kind}", problems)
        self.result.notes.append(
            f"{kind}: {ended.points} changes of files leave {len(groups)} different states; {resumed} were resumed"
        )
        shutil.rmtree(copies)

    def torn_writes(self, kind: str, seconds: float) -> None:
        """Kill in the middle of one write, or after one rename, and resume."""
        self._expected(kind)
        points, killed = self.worker.run(self._words(kind, self._started(kind, "count")), env=self.env).points, 0
        for point in _until(seconds, self.rng.sample(range(1, points + 1), points)):
            out = self._started(kind, "torn")
            ended = self.worker.run(self._words(kind, out), fault="kill_after", at=point, env=self.env)
            if ended.signal != signal.SIGKILL:
                continue
            problems = [*half_written(out), *self._resumed(kind, out, out)]
            killed += self.result.trial(f"killed at write {point} of {kind}", problems)
        self.result.notes.append(f"{kind}: killed in the middle of {killed} of {points} changes")

    def random_moments(self, kinds: list[str], seconds: float) -> None:
        """Kill a run at random moments until it ends; then the next kind."""
        kills, ends, until = 0, 0, time.monotonic() + seconds
        while time.monotonic() < until:
            kind = kinds[ends % len(kinds)]
            expected, out = self._expected(kind), self._started(kind, "random")
            for _ in range(200):
                moment = self.rng.expovariate(1 / 4) if time.monotonic() < until else None
                ended = self.worker.run(self._words(kind, out), kill_after=moment, env=self.env)
                if ended.signal != signal.SIGKILL:
                    break
                kills += 1
                self.result.trial(f"kill {kills} after {moment:.2f} s of {kind}", half_written(out))
            ends += 1
            problems = ended.problems(0) or _difference(out, expected)
            self.result.trial(f"{kind} after random kills", problems)
        self.result.notes.append(f"{kills} kills at random moments in {ends} runs")

    def _expected(self, kind: str) -> dict[str, str]:
        """Return the hashes of an undisturbed run, which is made once."""
        if kind not in self._undisturbed:
            out = self.project / f"undisturbed-{kind}"
            ended = self.worker.run(self._words(kind, out), env=self.env)
            assert ended.code == 0, ended.stderr
            self._undisturbed[kind] = result_of(out)
        return self._undisturbed[kind]

    def _started(self, kind: str, name: str) -> Path:
        """Return a new folder of a run that has measured its latencies, and done nothing else."""
        self._expected(kind)
        out = self.project / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for file in RECORDED:
            shutil.copy(self.project / f"undisturbed-{kind}" / file, out / file)
        return out

    def _resumed(self, kind: str, state: Path, out: Path) -> list[str]:
        """Continue from a state in the folder `out`; return what is wrong with the result."""
        if state != out:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(state, out)
        ended = self.worker.run(self._words(kind, out), env=self.env)
        return ended.problems(0) or _difference(out, self._expected(kind))

    def _words(self, kind: str, out: Path) -> list[str]:
        return compress_words(self.project, kind, out)


def _difference(out: Path, expected: dict[str, str]) -> list[str]:
    found = result_of(out)
    names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    left = [str(path) for path in out.rglob("*") if is_temporary(path.relative_to(out))]
    return [f"another result: {', '.join(names)}"] * bool(names) + [f"left over: {left}"] * bool(left)


def _until(seconds: float, items: list[Any]) -> Iterator[Any]:
    """Yield items until the time is over, at least one."""
    end = time.monotonic() + seconds
    for number, item in enumerate(items):
        if number and time.monotonic() > end:
            return
        yield item
