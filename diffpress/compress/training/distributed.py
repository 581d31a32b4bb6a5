"""Several processes under `accelerate launch`: all walk a recipe's stages, the main one alone writes and speaks.

    accelerate launch --multi_gpu --num_processes 4 -m diffpress compress ...

What is done once the main process does while the others `wait`, and then they read what it wrote: all must see the same
folders. Without a launcher there is one process, the main one, and nothing here does anything.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, get_int_from_env, parse_flag_from_env

from diffpress.runtime.errors import DiffpressError, InvalidInputError, report_error

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # what launchers tell
PATIENCE = timedelta(days=30)  # torch's own, minutes, is less than a stage of the main process may take
GRACE_S = 30.0  # in which a launcher ends the others: on a busy machine a process takes seconds to be gone


def _state() -> PartialState | None:
    """Accelerate's view of the processes, None where there is but one; the first call meets the others."""
    if get_int_from_env(SIZES, 1) < 2:
        return None
    for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise InvalidInputError(
                f"accelerate is set to {kind}, which splits a model; launch with --multi_gpu, which copies"
            )
    # accelerate takes processes without a GPU for unrelated ones unless it is told
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(on_cpu, timeout=PATIENCE)


def count() -> int:
    state = _state()
    return state.num_processes if state else 1


def index() -> int:
    state = _state()
    return state.process_index if state else 0


def is_main() -> bool:
    return index() == 0


def wait() -> None:
    """Go on when all are here."""
    state = _state()
    if state is not None:
        state.wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others do; they never do where it fails."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def agreed(value: int) -> int:
    """The main process's value, in all."""
    state = _state()
    return value if state is None else int(broadcast(torch.tensor(value, device=state.device)))


@contextmanager
def together() -> Iterator[None]:
    """What the processes do together; after it there is the main one alone, and the others may end.

    What ends one ends all, and one of them says why: the launcher stops the others when one has failed. So whoever has
    lost its partners, or may be about to say what the main process says already, gives the launcher the time for that.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise (KeyboardInterrupt if is_main() else SystemExit(130)) from None
    except Exception as error:
        if count() > 1:
            if not (is_main() and isinstance(error, DiffpressError)):
                time.sleep(GRACE_S)
            if isinstance(error, DiffpressError):
                _leave(report_error(str(error), error.exit_code))
        raise
    state = _state()
    if state is not None:
        state.wait_for_everyone()
        state.destroy_process_group()


def _leave(code: int) -> NoReturn:
    """End here and now: threads of gloo, which the others have not let go, abort an interpreter that takes its time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
