"""Other surroundings: a command gives the same bytes or one line, whatever the locale, clock, path and user.

surroundings  locales, time zones, clocks that are wrong or jump, umask, HOME, hash seeds: the same samples
paths         spaces, quotes, newlines, other scripts, 200 characters, links to folders
users         a user without rights, a read-only home
compress      PYTHONHASHSEED 0, 1 and random, a Turkish locale and another time zone: the same bundle
processors    OpenVINO's kernels for older processors (ONEDNN_MAX_CPU_ISA): by how much the samples differ
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.campaign.result import Result
from tests.campaign.states import is_temporary
from tests.campaign.worker import ROOT, Worker
from tests.campaign.workload import compress_words, make_project, result_of

TINY = ROOT / "tests" / "runtime" / "tiny_bundle"
ENGINES = ("onnxruntime", "openvino")
ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "locale C": {"LC_ALL": "C"},
    "locale C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "Turkish locale": {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"},
    "latin-1 output": {"PYTHONIOENCODING": "latin-1"},
    "time zone of Kiritimati": {"TZ": "Pacific/Kiritimati"},
    "time zone that does not exist": {"TZ": "Nowhere/None"},
    "no HOME": {"HOME": None},
    "a HOME that does not exist": {"HOME": "/nonexistent/home"},
    "an empty environment": dict.fromkeys(set(os.environ) - {"PATH", "PYTHONPATH"}),
    "PYTHONHASHSEED 0": {"PYTHONHASHSEED": "0"},
    "PYTHONHASHSEED 1": {"PYTHONHASHSEED": "1"},
    "warnings as errors": {"PYTHONWARNINGS": "error"},
    "optimized Python": {"PYTHONOPTIMIZE": "2"},
}
PREFIXES = {  # where the command faketime is installed
    "a clock of 1970": ("faketime", "1970-01-02 00:00:00"),
    "a clock of 2037": ("faketime", "2037-12-31 23:59:59"),
    "a clock that runs 1000 times as fast": ("faketime", "-f", "+0 x1000"),
}
PATHS = {
    "spaces": "a folder  of mine",
    "quotes": 'it\'s a "folder" `of` $HOME',
    "newlines": "one\ntwo",
    "other scripts": "ﬁgürlich-图像-صورة-🐙",
    "200 characters": "x" * 200,
    "a leading dash": "-out",
    "percent signs": "100%s%d{}",
    "dots": ".hidden.partial",
}
ISAS = ("AVX512_CORE_VNNI", "AVX512_CORE", "AVX2_VNNI", "AVX2", "SSE41")


def run(minutes: float, seed: int) -> Result:
    """Run all parts once, the short ones first; `compress` repeats while there is time."""
    result, end = Result(), time.monotonic() + minutes * 60
    with tempfile.TemporaryDirectory(prefix="platform-") as name:
        trials = Trials(Path(name), result, random.Random(seed))
        trials.surroundings()
        trials.paths()
        trials.users()
        trials.processors()
        trials.compress(end)
    return result


class Trials:
    """Commands in other surroundings, compared with the usual ones."""

    def __init__(self, folder: Path, result: Result, rng: random.Random) -> None:
        self.folder, self.result, self.rng = folder, result, rng
        self.usual = {engine: self._samples(engine)[0] for engine in ENGINES}

    def surroundings(self) -> None:
        """Sample under other environments, clocks and permissions."""
        for name, change in ENVIRONMENTS.items():
            for engine in ENGINES:
                self._compare(name, engine, change)
        for name, prefix in PREFIXES.items():
            if shutil.which(prefix[0]) is None:
                self.result.notes.append(f"{name}: not run, faketime is not installed")
                continue
            for engine in ENGINES:
                self._compare(name, engine, {}, prefix)
        for mask, mode in ((0o077, 0o600), (0o000, 0o666), (0o022, 0o644)):
            file = self.folder / f"mask-{mask:o}.npy"
            words = ["sh", "-c", f'umask {mask:03o}; exec "$@"', "sh", *self._words("onnxruntime", file)]
            ended = self._run(words)
            problems = (
                ended
                if ended
                else [f"mode {stat.S_IMODE(file.stat().st_mode):o}"] * (stat.S_IMODE(file.stat().st_mode) != mode)
            )
            self.result.trial(f"umask {mask:03o}", problems)

    def paths(self) -> None:
        """Read a bundle from, and write to, folders with unusual names; and through links."""
        for name, part in PATHS.items():
            place = self.folder / "paths" / part
            shutil.copytree(TINY, place / "bundle")
            for engine in ENGINES:
                self._at(f"path with {name}", engine, place / "bundle", place / "out" / "x.npy")
        (self.folder / "link").symlink_to(self.folder / "paths" / PATHS["spaces"])
        (self.folder / "linked").mkdir()
        for file in TINY.iterdir():
            (self.folder / "linked" / file.name).symlink_to(file)
        for engine in ENGINES:
            self._at("a link to a folder", engine, self.folder / "link" / "bundle", self.folder / "link" / "y.npy")
            self._at("a folder of links", engine, self.folder / "linked", self.folder / "links.npy")

    def users(self) -> None:
        """Sample as a user without rights, with a home that he cannot write."""
        if os.geteuid() != 0:
            self.result.notes.append("another user: not run, it needs root")
            return
        folder = Path(tempfile.mkdtemp(dir="/tmp"))  # below the other folders is no way for others
        folder.chmod(0o777)
        try:
            shutil.copytree(TINY, folder / "bundle")
            with Worker() as worker:
                for engine in ENGINES:
                    words = self._words(engine, folder / f"{engine}.npy", folder / "bundle")[3:]
                    worker.run(words)  # what it imports need not be readable by the other user
                    (folder / f"{engine}.npy").unlink()
                    for home in ("/root", "/nonexistent"):
                        ended = worker.run(words, user=65534, env={"HOME": home, "XDG_CACHE_HOME": ""})
                        wrong = ended.problems(0) or self._difference(engine, folder / f"{engine}.npy")
                        self.result.trial(f"user 65534 with HOME={home}, {engine}", wrong)
                    denied = [*words[:-1], "/root/x.npy"]
                    wrong = worker.run(denied, user=65534).problems(2)
                    self.result.trial(f"user 65534 writes where he may not, {engine}", wrong)
        finally:
            shutil.rmtree(folder)

    def processors(self) -> None:
        """Say by how much the samples differ under OpenVINO's kernels for older processors."""
        for isa in ISAS:
            array, problems = self._samples("openvino", {"ONEDNN_MAX_CPU_ISA": isa, "DIFFPRESS_CACHE": ""})
            if self.result.trial(f"ONEDNN_MAX_CPU_ISA={isa}", problems):
                difference = float(np.abs(array - self.usual["openvino"]).max())
                self.result.notes.append(f"ONEDNN_MAX_CPU_ISA={isa}: samples differ by at most {difference:.2g}")
        difference = float(np.abs(self.usual["onnxruntime"] - self.usual["openvino"]).max())
        self.result.notes.append(f"onnxruntime and openvino: samples differ by at most {difference:.2g}")

    def compress(self, end: float) -> None:
        """Run a recipe under hash seeds, locales and time zones; all bundles have one hash."""
        project = make_project(self.folder)
        surroundings = ({"PYTHONHASHSEED": "0"}, {"PYTHONHASHSEED": "1", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"})
        found: list[dict[str, str]] = []
        for number, change in enumerate((*surroundings, *[{"PYTHONHASHSEED": "random"}] * 100)):
            if number > 1 and time.monotonic() > end:
                break
            out = project / f"it's run {number}"
            problems = self._run(_python(compress_words(project, "light", out)), change)
            if not problems:
                found.append(result_of(out))
                problems = ["another result"] * (found[-1] != found[0])
            self.result.trial(f"compress with {change}", problems)

    def _compare(self, name: str, engine: str, change: Mapping[str, str | None], prefix: Sequence[str] = ()) -> None:
        array, problems = self._samples(engine, change, prefix)
        self.result.trial(f"{name}, {engine}", problems or _difference(array, self.usual[engine]))

    def _at(self, name: str, engine: str, bundle: Path, file: Path) -> None:
        problems = self._run(self._words(engine, file, bundle)) or self._difference(engine, file)
        left = [f"left over {p.name!r}" for p in file.parent.glob(".*") if is_temporary(Path(p.name))]
        self.result.trial(f"{name}, {engine}", problems + left)

    def _samples(
        self, engine: str, change: Mapping[str, str | None] | None = None, prefix: Sequence[str] = ()
    ) -> tuple[np.ndarray, list[str]]:
        file = self.folder / "x.npy"
        file.unlink(missing_ok=True)
        problems = self._run([*prefix, *self._words(engine, file)], change or {})
        return np.zeros(0) if problems else np.load(file), problems

    def _difference(self, engine: str, file: Path) -> list[str]:
        return _difference(np.load(file), self.usual[engine])

    def _words(self, engine: str, out: Path, bundle: Path = TINY) -> list[str]:
        return _python(["sample", str(bundle), "--engine", engine, "--threads", "1", "-n", "4", "--out", str(out)])

    def _run(self, words: Sequence[str], change: Mapping[str, str | None] | None = None) -> list[str]:
        """Run a command in a changed environment; return what is wrong."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["DIFFPRESS_CACHE"] = str(self.folder / "cache")
        for name, value in (change or {}).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        ended = subprocess.run(words, env=environment, capture_output=True, cwd=self.folder, check=False)
        error = ended.stderr.decode(errors="replace").strip()
        return [f"ended with {ended.returncode}: {error[-300:]}"] if ended.returncode or "Traceback" in error else []


def _difference(found: np.ndarray, expected: np.ndarray) -> list[str]:
    return [] if np.array_equal(found, expected) else [f"differs by {np.abs(found - expected).max():.3g}"]


def _python(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "diffpress", *words]
