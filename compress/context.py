"""What a stage needs besides its checkpoint and config: the seed, the data, and a folder to resume from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.checkpoint import Checkpoint
from compress.data import ImageData
from runtime.errors import BadInput


@dataclass(frozen=True)
class Context:
    """`teacher` is the checkpoint the run began with; `work` keeps what a killed stage needs to go on."""

    seed: int
    work: Path
    teacher: Checkpoint
    data: ImageData | None = None

    def require_data(self, purpose: str) -> ImageData:
        if self.data is None:
            raise BadInput(f"{purpose} needs images: set 'data: FILE.npz' in the recipe")
        return self.data


def say(text: str) -> None:
    print(f"  {text}", flush=True)
