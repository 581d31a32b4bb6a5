"""runtime/io/locks.py: one process at a time, and no lock remains of a process that has ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io import locks
from diffpress.runtime.io.locks import exclusive

ROOT = Path(__file__).parents[3]
HOLD = (
    "import sys; from pathlib import Path; from diffpress.runtime.io.locks import exclusive\n"
    "with exclusive(Path(sys.argv[1]), Path('work')):\n    print('held', flush=True); sys.stdin.readline()\n"
)


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that holds `tmp_path`/lock until a line is sent to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "lock"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_held_lock_is_refused_and_free_again_after_its_block(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="work: another command is writing here; wait until it has ended"):
        exclusive(tmp_path / "lock", Path("work")).__enter__()
    holder.communicate("\n", timeout=30)
    assert not (tmp_path / "lock").exists()
    with exclusive(tmp_path / "lock", Path("work")):
        assert (tmp_path / "lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.communicate()
    assert (tmp_path / "lock").exists()
    with exclusive(tmp_path / "lock", Path("work")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_removed_while_we_waited_for_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its last owner had released it between our opening of the file and our locking of it."""
    lock, tried = tmp_path / "lock", 0
    take = locks._try_lock

    def removed_first(descriptor: int) -> None:
        nonlocal tried
        tried += 1
        if tried == 1:
            lock.unlink()
        take(descriptor)

    monkeypatch.setattr(locks, "_try_lock", removed_first)
    with exclusive(lock, Path("work")):
        assert tried == 2 and lock.is_file()
        with pytest.raises(InvalidInputError, match="another command"):
            exclusive(lock, Path("work")).__enter__()


def test_a_file_system_without_locks_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks, "_try_lock", no_locks)
    with exclusive(tmp_path / "lock", Path("work")):
        pass
    assert list(tmp_path.iterdir()) == []
