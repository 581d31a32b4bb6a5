"""What a stage needs besides its checkpoint and config: the seed, the data, and a folder to resume from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from compress.checkpoint import Checkpoint
from runtime.denoise import Conditions, stand_in_conditions
from runtime.errors import BadInput


class Data(Protocol):
    """What training and pruning learn from (compress/data.py, compress/teacher_data.py)."""

    @property
    def hash(self) -> str: ...

    @property
    def null(self) -> dict[str, torch.Tensor]: ...

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...

    def conditions(self, count: int) -> Conditions: ...


@dataclass(frozen=True)
class Context:
    """`teacher` is the checkpoint the run began with; `work` keeps what a killed stage needs to go on."""

    seed: int
    work: Path
    teacher: Checkpoint
    data: Data | None = None

    def require_data(self, purpose: str) -> Data:
        if self.data is None:
            raise BadInput(f"{purpose} needs images: set 'data: FILE.npz' in the recipe")
        return self.data

    def conditions(self, count: int) -> Conditions:
        """What `count` samples are told while the model samples for calibration."""
        return stand_in_conditions(self.teacher.spec, count) if self.data is None else self.data.conditions(count)


def say(text: str) -> None:
    print(f"  {text}", flush=True)
