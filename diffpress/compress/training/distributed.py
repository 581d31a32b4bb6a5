"""Several processes under `accelerate launch`: all run the stages, the main one writes and prints.

    accelerate launch --multi_gpu --num_processes 4 -m diffpress compress ...

Work that is done once is done by the main process while the others `wait`; then they read its files, so all processes
must see the same folders. Without a launcher there is a single process, the main one, and these functions do nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env

from diffpress.runtime.errors import DiffpressError, InvalidInputError

logger = logging.getLogger(__name__)

WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # set by launchers
COLLECTIVE_TIMEOUT = timedelta(days=30)  # the others wait during the main process's stages; torch's default is minutes
GRACE_S = 30.0  # time for the launcher to terminate a process, which takes seconds on a busy machine


def _state() -> PartialState | None:
    """Return accelerate's process state, or None for a single process.

    The first call initializes the process group.
    """
    if get_int_from_env(WORLD_SIZE_VARIABLES, 1) < 2:
        return None
    for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise InvalidInputError(
                f"accelerate is configured for {kind}, which shards the model; launch with --multi_gpu instead"
            )
    # without this flag accelerate does not group processes that have no GPU
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(on_cpu, timeout=COLLECTIVE_TIMEOUT)


def count() -> int:
    """Return the number of processes."""
    state = _state()
    return state.num_processes if state else 1


def index() -> int:
    """Return the rank of this process."""
    state = _state()
    return state.process_index if state else 0


def is_main() -> bool:
    """Return whether this is the main process."""
    return index() == 0


def wait() -> None:
    """Wait until all processes have reached this call."""
    state = _state()
    if state is not None:
        state.wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process first, then in the others unless it fails."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@contextmanager
def together() -> Iterator[None]:
    """Run a block in all processes; at its end wait for all and close the process group.

    Only the main process has work left afterwards. If one process fails, the launcher terminates the others, and one
    error message is printed: a process that has lost its peers, or would repeat the message of the main process, first
    waits GRACE_S for the launcher.
    """
    package = logging.getLogger("diffpress")
    level = package.level
    if not is_main():
        package.setLevel(max(level, logging.WARNING))  # one process reports progress
    try:
        yield
    except KeyboardInterrupt:
        raise (KeyboardInterrupt if is_main() else SystemExit(130)) from None
    except Exception as error:
        if count() > 1:
            if not (is_main() and isinstance(error, DiffpressError)):
                time.sleep(GRACE_S)
            if isinstance(error, DiffpressError):
                logger.error(str(error))
                _exit_now(error.exit_code)
        raise
    finally:
        package.setLevel(level)
    state = _state()
    if state is not None:
        state.wait_for_everyone()
        state.destroy_process_group()


def _exit_now(code: int) -> NoReturn:
    """Exit without interpreter shutdown, in which gloo's threads abort if peers are still connected."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
