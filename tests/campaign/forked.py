"""Run one trial in a forked child, with limits of memory and time: a crash, a hang or a traceback is what it finds.

The parent imports diffpress and its libraries once and opens no engine, so that a child starts in milliseconds.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CPU_SECONDS = 10  # of processor time: other processes on the machine do not count
WALL_SECONDS = 300.0  # a child that waits for ever uses no processor time; a busy machine needs long for little
EXTRA_MEMORY = 3 * 2**30  # bytes of address space above the parent's
LONGEST_LINE = 2000
ACCEPTED, REFUSED, GATE_FAILED = 0, 2, 1
# what a Rust library prints when it panics, whatever Python does with the exception
PANIC = re.compile(rb"\nthread '.*' .*panicked at (?:.*\n)+?note: .*\n(?=diffpress: |\Z)")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
VERBS = ("bench", "compress", "evaluate", "export", "info", "plan", "sample", "serve")
IMPORTS = (
    "diffpress.api",
    "diffpress.cli.main",
    *(f"diffpress.cli.{verb}" for verb in VERBS),
    "diffpress.compress.pipeline",
    "diffpress.compress.sources.load",
    "diffpress.export.bundle",
    "diffpress.export.run",
    "diffpress.serve.models",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "transformers.models.clip.modeling_clip",
)


@dataclass(frozen=True)
class Outcome:
    """What a child did: its exit code, or the signal that ended it, and what it printed."""

    code: int | None
    signal: int | None
    out: str
    err: str
    seconds: float

    @property
    def refused(self) -> bool:
        """Whether it ended with exit code 2."""
        return self.code == REFUSED

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the outcome of any input, however hostile."""
        if self.signal is not None:
            hang = self.signal in (signal.SIGXCPU, signal.SIGKILL)
            yield f"{'hang' if hang else 'crash'}: {signal.Signals(self.signal).name} after {self.seconds:.1f} s"
            return
        if "Traceback (most recent call last)" in self.err:
            yield f"traceback: {self.err.strip().splitlines()[-1][:300]}"
            return
        if self.code not in (ACCEPTED, REFUSED, GATE_FAILED):
            yield f"exit code {self.code}: {self.err.strip()[:300]}"
        for stream in (self.out, self.err):
            if found := CONTROL.search(stream):
                at = found.start()
                yield f"control character {stream[at]!r} printed: {stream[max(0, at - 60) : at + 60]!r}"
        lines = [line for line in self.err.splitlines() if line.strip() and not line.startswith("warning: ")]
        if self.code and (len(lines) != 1 or not lines[0].startswith("diffpress: ")):
            yield f"not one line: {self.err.strip()[:300]!r}"
        if any(len(line) > LONGEST_LINE for line in lines):
            yield f"a line of {max(map(len, lines))} characters: {max(lines, key=len)[:200]}"


def import_everything() -> None:
    """Import what children use; lazy packages load their classes here instead of in each child."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["RUST_BACKTRACE"] = "0"
    for name in IMPORTS:
        importlib.import_module(name)
    import diffusers
    import transformers

    for name in ("AutoencoderKL", "DDIMScheduler", "StableDiffusionPipeline", "UNet2DConditionModel", "UNet2DModel"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)


def run_forked(action: Callable[[], int], folder: Path, limited: bool = True) -> Outcome:
    """Run `action` in a child whose current and temporary folder is `folder`; it returns the exit code."""
    out, err = folder / ".stdout", folder / ".stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _run_child(action, folder, out, err, limited)
    status = _waited(child, WALL_SECONDS if limited else 600.0)
    code, number = (None, os.WTERMSIG(status)) if os.WIFSIGNALED(status) else (os.WEXITSTATUS(status), None)
    printed = b"\n" + err.read_bytes()
    return Outcome(
        code,
        number,
        out.read_bytes().decode("utf-8", "replace"),
        PANIC.sub(b"\n", printed).decode("utf-8", "replace").lstrip("\n"),
        time.monotonic() - began,
    )


def command(words: list[object]) -> Callable[[], int]:
    """Return the action that runs a command line of diffpress."""
    from diffpress.cli.main import main

    return lambda: main([str(word) for word in words])


def _run_child(action: Callable[[], int], folder: Path, out: Path, err: Path, limited: bool) -> None:
    """Run the action and end the process; never returns."""
    code = 70  # an exception
    try:
        os.chdir(folder)
        tempfile.tempdir = str(folder)
        os.environ |= {"TMPDIR": str(folder), "DIFFPRESS_CACHE": str(folder / ".cache")}
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limited:
            most = _address_space() + EXTRA_MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        code = action()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _address_space() -> int:
    """Return the size of this process's address space in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _waited(child: int, seconds: float) -> int:
    """Return the status of a child, which is killed after so many seconds."""
    end, pause = time.monotonic() + seconds, 0.002
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
