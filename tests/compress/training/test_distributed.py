"""compress/training/distributed.py in a single process; tests/test_accelerate.py runs several."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffpress.compress.training import distributed
from diffpress.runtime.errors import InvalidInputError

ROOT = Path(__file__).parents[3]


def test_without_a_launcher_the_single_process_is_the_main_one() -> None:
    assert (distributed.count(), distributed.index(), distributed.is_main()) == (1, 0, True)
    done: list[int] = []
    with distributed.together(), distributed.main_first():
        distributed.wait()
        done.append(1)
    assert done == [1]


def test_errors_are_raised_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", pytest.fail)
    for error in (InvalidInputError("no"), RuntimeError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), distributed.together():
            raise error


def test_without_a_launcher_accelerate_is_not_set_up() -> None:
    code = (
        "from accelerate import PartialState\nfrom diffpress.cli.console import console\n"
        "from diffpress.compress.progress import progress\nfrom diffpress.compress.training import distributed\n"
        "with console(), distributed.together(), distributed.main_first(), progress('here', 1) as advance:\n"
        "    distributed.wait()\n    advance(1)\n"
        "print(PartialState._shared_state)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["  here: 1/1", "{}"]


def test_a_launcher_that_shards_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidInputError, match=r"FSDP.*--multi_gpu"):
        distributed.count()
