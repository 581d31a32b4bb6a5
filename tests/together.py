"""The verb that the processes of tests/test_accelerate.py run: a tiny training, or a failure.

    accelerate launch ... -m tests.together try train FOLDER ...             train in each folder
    accelerate launch ... -m tests.together try accumulate FOLDER            train with several batches per step
    accelerate launch ... -m tests.together try kill FOLDER                  train, killed before the end
    accelerate launch ... -m tests.together try stages CHECKPOINT RECIPE OUT [KEY=VALUE ...]     run a recipe's stages
    accelerate launch ... -m tests.together try refuse PROCESS [GRACE_S]     fail with invalid input in one process
    accelerate launch ... -m tests.together try diverge FOLDER               train with a NaN loss in process 1

Training and stages are imported in the functions that need them, since importing diffusers takes seconds.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from diffpress.cli.main import reported
from diffpress.compress.training import distributed
from diffpress.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from diffpress.compress.training.loop import Objective, Training

logger = logging.getLogger("diffpress.tests.together")

STEPS, SEED = 12, 3
KILLED_AT = 8
ACCUMULATE = 3


class TwoLayers(nn.Module):
    """Two layers; a step trains one of them, as in `score`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, which: str, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = getattr(self, which)(x)
        return out


def run_in(folder: Path, accumulate: int = 1) -> Training:
    from diffpress.compress.training.loop import Training

    return Training(STEPS, 0.05, 2, 0.8, SEED, 3, folder / "work", "distill test", accumulate=accumulate, partial=True)


def choose_layer(generator: torch.Generator) -> tuple[int]:
    return (int(torch.randint(0, 2, (), generator=generator)),)


def loss_on(model: nn.Module, which: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(16, 4, generator=generator)
    return torch.mean((model("ab"[which], x) - x.flip(1)) ** 2)


def together(model: nn.Module, which: int, generator: torch.Generator, share: float) -> torch.Tensor:
    return loss_on(model, which, generator)


def drawing_late(loss_of: Callable[[nn.Module, int, torch.Generator, float], torch.Tensor]) -> Objective:
    """Return an objective whose loss draws its own random numbers, which works on the CPU only."""
    from diffpress.compress.training.loop import Objective

    return Objective(lambda generator, share: (generator, share), loss_of, choose_layer)


def run(words: list[str]) -> int:
    action, target, *rest = words
    with distributed.together():
        logger.info("here")
        if action == "refuse":
            with distributed.main_first():
                if distributed.index() == int(target):
                    distributed.GRACE_S = float(rest[0]) if rest else distributed.GRACE_S
                    raise InvalidInputError(f"bad input of process {target}")
            distributed.wait()
        elif action == "stages":
            _run_stages(target, *rest)
        else:
            for folder in (target, *rest):
                _train(action, Path(folder))
    return 0


def _run_stages(checkpoint: str, recipe: str, out: str, *settings: str) -> None:
    from diffpress.compress.pipeline import run_stages
    from diffpress.compress.recipe import Recipe
    from diffpress.compress.sources.load import load_checkpoint

    run_stages(load_checkpoint(checkpoint), Recipe.load(Path(recipe), settings), Path(out))


def _train(action: str, folder: Path) -> None:
    from diffpress.compress.training.loop import train

    def loss_of(model: nn.Module, which: int, generator: torch.Generator, share: float) -> torch.Tensor:
        if action == "kill" and round(share * STEPS) == KILLED_AT and distributed.index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        bad = action == "diverge" and share > 0.5 and distributed.index() == 1
        return together(model, which, generator, share) * (float("nan") if bad else 1.0)

    run = run_in(folder, ACCUMULATE if action == "accumulate" else 1)
    found = train(TwoLayers(), drawing_late(loss_of), run)
    save_file(found.state_dict(), folder / f"process-{distributed.index()}.safetensors")


if __name__ == "__main__":
    sys.exit(reported(lambda: run(sys.argv[2:]), "try"))
