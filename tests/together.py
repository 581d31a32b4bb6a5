"""What every process of tests/test_accelerate.py runs, as a verb of diffpress: a tiny training, or an end that fails.

    accelerate launch ... -m tests.together try train FOLDER ...        a training in each folder
    accelerate launch ... -m tests.together try kill FOLDER             one that is killed on its way
    accelerate launch ... -m tests.together try stages CHECKPOINT RECIPE OUT [key=value ...]     a recipe, no export
    accelerate launch ... -m tests.together try refuse PROCESS [GRACE_S]     that process alone finds bad input
    accelerate launch ... -m tests.together try diverge FOLDER          the loss of process 1 is no number

Training and stages are imported where they are asked for: diffusers takes seconds to load, and bad input needs none.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from diffpress.cli.main import run_verb
from diffpress.compress.context import say
from diffpress.compress.training import distributed
from diffpress.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from diffpress.compress.training.loop import Objective, Training

STEPS, SEED = 12, 3
KILLED_AT = 8


class Two(nn.Module):
    """Two layers of which a step trains one, as `score` does."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, which: str, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = getattr(self, which)(x)
        return out


def run_in(folder: Path) -> Training:
    from diffpress.compress.training.loop import Training

    return Training(STEPS, 0.05, 2, 0.8, SEED, 3, folder / "work", "distill test", partial=True)


def chosen(generator: torch.Generator) -> int:
    return int(torch.randint(0, 2, (), generator=generator))


def loss_on(model: nn.Module, which: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(16, 4, generator=generator)
    return torch.mean((model("ab"[which], x) - x.flip(1)) ** 2)


def together(model: nn.Module, generator: torch.Generator, share: float) -> torch.Tensor:
    return loss_on(model, distributed.agreed(chosen(generator)), generator)


def drawing_late(loss_of: Callable[[nn.Module, torch.Generator, float], torch.Tensor]) -> Objective:
    """An objective whose loss draws for itself, which on one device it may."""
    from diffpress.compress.training.loop import Objective

    return Objective(lambda generator, share: (generator, share), loss_of)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+")


def run(args: argparse.Namespace) -> int:
    what, where, *rest = args.words
    with distributed.together():
        say("here")
        if what == "refuse":
            with distributed.main_first():
                if distributed.index() == int(where):
                    distributed.GRACE_S = float(rest[0]) if rest else distributed.GRACE_S
                    raise InvalidInputError(f"bad input of process {where}")
            distributed.wait()
        elif what == "stages":
            _walk(where, *rest)
        else:
            for folder in (where, *rest):
                _train(what, Path(folder))
    return 0


def _walk(checkpoint: str, recipe: str, out: str, *settings: str) -> None:
    from diffpress.compress.pipeline import run_stages
    from diffpress.compress.recipe import read_recipe
    from diffpress.compress.sources.load import load_checkpoint

    run_stages(load_checkpoint(checkpoint), read_recipe(Path(recipe), settings), Path(out))


def _train(what: str, folder: Path) -> None:
    from diffpress.compress.training.loop import train

    def loss_of(model: nn.Module, generator: torch.Generator, share: float) -> torch.Tensor:
        if what == "kill" and round(share * STEPS) == KILLED_AT and distributed.index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        bad = what == "diverge" and share > 0.5 and distributed.index() == 1
        return together(model, generator, share) * (float("nan") if bad else 1.0)

    found = train(Two(), drawing_late(loss_of), run_in(folder))
    save_file(found.state_dict(), folder / f"process-{distributed.index()}.safetensors")


if __name__ == "__main__":
    sys.exit(run_verb("try", lambda: sys.modules[__name__], sys.argv[2:]))
