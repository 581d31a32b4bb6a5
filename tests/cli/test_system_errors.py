"""cli/system_errors.py: what the machine lacks is said in one line, and errors of diffpress keep their traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffpress.cli.main import reported
from diffpress.cli.system_errors import HINTS, system_error

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "runtime" / "tiny_bundle"


def failing(error: Exception) -> Any:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize("number", HINTS)
def test_an_error_of_the_system_is_one_line_with_the_file_and_what_to_do(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reported(failing(OSError(number, os.strerror(number), "/data/x")), "diffpress bench") == 2
    assert capsys.readouterr().err == f"diffpress: /data/x: {os.strerror(number)}; {HINTS[number]}\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("Exception from src/core:1:\nstd::bad_alloc\n"),
    ],
)
def test_too_little_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(failing(error), "diffpress sample") == 2
    message = capsys.readouterr().err
    assert message.startswith("diffpress: not enough memory (") and message.count("\n") == 1
    assert message.endswith("free memory, or work with a smaller batch\n")


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), OSError(errno.EBADF, "Bad file descriptor")])
def test_other_errors_are_raised(error: Exception) -> None:
    assert system_error(error) is None
    with pytest.raises(type(error)):
        reported(failing(error), "diffpress sample")


def diffpress(*words: str, prefix: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'{prefix} exec "$@"', "sh", sys.executable, "-m", "diffpress", *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | changes, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line() -> None:
    ended = diffpress("recipes", prefix="exec >/dev/full;")
    assert ended.returncode == 2
    assert ended.stderr == f"diffpress: No space left on device; {HINTS[errno.ENOSPC]}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux's shells")
def test_a_limit_of_the_file_size_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    words = ("sample", str(TINY), "--engine", "onnxruntime", "--no-cache", "-n", "64", "--out", str(out))
    ended = diffpress(*words, prefix="ulimit -f 8;")
    assert ended.returncode == 2 and list(tmp_path.iterdir()) == []
    assert ended.stderr == f"diffpress: {out}: cannot be written (File too large); choose another path\n"
    assert diffpress(*words).returncode == 0


def test_without_a_temporary_folder_the_message_names_the_variable() -> None:
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/']")
    assert str(system_error(error)).endswith("; set TMPDIR to a writable folder")
