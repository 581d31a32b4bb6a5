"""Runs `diffpress` commands in forks of one process that has imported everything: a trial takes no import of torch.

    with Worker() as worker:
        ended = worker.run(["compress", ...], fault="full_disk", at=17)
        ended.code, ended.signal, ended.stderr

The process has fault_points.c preloaded, so that a fault can be injected at any single write, also of native code.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("fault_points.c")
FAULTS = ("off", "count", "kill_before", "kill_after", "full_disk", "enospc_once", "snapshot")  # as in fault_points.c
LIMITS = {"memory": resource.RLIMIT_AS, "file_size": resource.RLIMIT_FSIZE, "files": resource.RLIMIT_NOFILE}


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code or signal, its output, and the number of file changes that it made."""

    code: int | None
    signal: int | None
    stdout: str
    stderr: str
    points: int
    seconds: float

    @property
    def hung(self) -> bool:
        """Whether it was stopped because it took too long."""
        return self.signal == signal.SIGALRM

    def problems(self, *expected: int) -> list[str]:
        """Return what is wrong with an end: another exit code, a traceback, or an error that is not one line."""
        found = []
        if self.code not in expected:
            found.append(f"ended with {self.code if self.signal is None else f'signal {self.signal}'}")
        if "Traceback" in self.stderr:
            found.append("traceback " + self.stderr.strip().splitlines()[-1])
        elif self.code == 2 and not self.stderr.strip():
            found.append("no message")
        elif self.code not in expected:
            found.append(self.stderr.strip()[-200:])
        return found


def compiled_faults(folder: Path) -> Path:
    """Compile fault_points.c; raises CalledProcessError or FileNotFoundError without a C compiler."""
    library = folder / "fault_points.so"
    words = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(words, check=True, capture_output=True)
    return library


class Worker:
    """A process that runs commands in forks.

    What the first command imports is then imported in the process itself, once for all later commands.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="campaign-"))
        library = compiled_faults(self._folder)
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaign.worker", str(library)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its stdin, which ends it
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        fault: str = "count",
        at: int = 0,
        kill_after: float | None = None,
        snapshots: tuple[Path, Path] | None = None,
        limits: Mapping[str, int] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: int | None = None,
        timeout: float = 1800.0,
    ) -> Ended:
        """Run one command line.

        Args:
            argv: The words after `diffpress`.
            fault: One of FAULTS, which happens at point `at` of the file changes (fault_points.c).
            at: Number of the point, from 1.
            kill_after: Send SIGKILL after so many seconds.
            snapshots: For fault `snapshot`: the folder to copy before every point, and where to.
            limits: Resource limits in bytes or descriptors, by the names of LIMITS.
            env: Environment variables to add.
            cwd: Working folder.
            user: Id of the user and group to run as.
            timeout: Seconds after which the command counts as hung.
        """
        order = {
            "argv": [str(word) for word in argv],
            "fault": FAULTS.index(fault),
            "at": at,
            "kill_after": kill_after,
            "snapshots": [str(path) for path in snapshots or ()],
            "limits": dict(limits or {}),
            "env": dict(env or {}),
            "cwd": str(cwd or ROOT),
            "user": user,
            "timeout": timeout,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


# --- in the process that forks -----------------------------------------------------------------------------------


def serve(library: str) -> None:
    """Read orders from stdin and answer each with how its fork ended, until stdin is closed."""
    faults = ctypes.CDLL(library)
    faults.faults_count.restype = ctypes.c_long
    __import__("diffpress.cli.main")
    for line in sys.stdin:
        gc.freeze()  # or a collection in the fork would copy all pages
        ended = _forked(json.loads(line), faults)
        sys.stdout.write(json.dumps(ended) + "\n")
        sys.stdout.flush()


def _forked(order: dict[str, Any], faults: ctypes.CDLL) -> dict[str, Any]:
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "points")}
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _command(order, faults, {name: ends[1] for name, ends in pipes.items()})
    for _, end in pipes.values():
        os.close(end)
    texts, stopped = _drained(child, {ends[0]: name for name, ends in pipes.items()}, order, began)
    status = os.waitpid(child, 0)[1]
    ended = signal.SIGALRM if stopped else os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    points, _, modules = texts["points"].partition(" ")
    _import(modules.split())
    return {
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "signal": ended,
        "stdout": texts["stdout"],
        "stderr": texts["stderr"],
        "points": int(points or 0),
        "seconds": round(time.monotonic() - began, 2),
    }


def _import(modules: Sequence[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            with contextlib.suppress(Exception):  # such as those that torch adds to sys.modules
                importlib.import_module(module)


def _drained(child: int, ends: dict[int, str], order: dict[str, Any], began: float) -> tuple[dict[str, str], bool]:
    """Read all pipes to their end; kill the child at its moment, or after the timeout (then True is returned)."""
    found = dict.fromkeys(ends.values(), b"")
    moment, limit, stopped = order["kill_after"], order["timeout"], False
    while ends:
        for end in select.select(list(ends), [], [], 0.005 if moment is not None else 0.2)[0]:
            data = os.read(end, 1 << 16)
            found[ends[end]] += data
            if not data:
                os.close(end)
                del ends[end]
        passed = time.monotonic() - began
        if passed > limit or (moment is not None and passed > moment):
            stopped = passed > limit
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            moment, limit = None, float("inf")
    return {name: data.decode(errors="replace") for name, data in found.items()}, stopped


def _command(order: dict[str, Any], faults: ctypes.CDLL, ends: dict[str, int]) -> None:
    """Run the command in the child, and end the process."""
    code, before = 70, set(sys.modules)
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(ends[name], descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(order["cwd"])
        os.environ.update(order["env"])
        tempfile.tempdir = None  # TMPDIR may be another one now
        for name, limit in order["limits"].items():
            resource.setrlimit(LIMITS[name], (limit, limit))
        if order["user"] is not None:
            os.setgroups([])
            os.setgid(order["user"])
            os.setuid(order["user"])
        from diffpress.cli.main import main

        if order["snapshots"]:
            faults.faults_snapshots(*(os.fsencode(path) for path in order["snapshots"]))
        faults.faults_arm(order["fault"], order["at"])
        code = main(order["argv"])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    faults_made = faults.faults_count()
    faults.faults_arm(0, 0)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    new = " ".join(sorted(set(sys.modules) - before))
    os.write(ends["points"], f"{faults_made} {new}".encode())
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
