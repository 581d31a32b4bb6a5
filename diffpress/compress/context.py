"""What a stage needs besides its checkpoint and config: the seed, the data, and a folder to resume from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.training.distributed import is_main
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs, Network, dummy_conditioning


class Data(Protocol):
    """What training and pruning learn from (compress/training/image_data.py, compress/training/teacher_data.py)."""

    @property
    def hash(self) -> str: ...

    @property
    def uncond(self) -> dict[str, torch.Tensor]: ...

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...

    def conditions(self, count: int) -> ConditioningInputs: ...


class EngineCosts(Protocol):
    """What quantizing one checkpoint costs and gains in an engine, measured there (export/targets/engine_cost.py)."""

    def gains_ms(self, quantization: Quantization) -> dict[str, float]:
        """Module with scales -> its milliseconds in the float graph less those in the quantized graph."""

    def latency_ratio(self, quantization: Quantization) -> float:
        """One step of the quantized graph against one of the float graph."""

    def size_mib(self, quantization: Quantization) -> float:
        """Of the quantized graph's file."""

    def network(self, quantization: Quantization | None) -> AbstractContextManager[Network]:
        """The graph in the engine; None for the float one."""


# (float checkpoint, name of an engine); `export` knows engines, and what runs a recipe passes this in
CostsIn = Callable[[Checkpoint, str], AbstractContextManager[EngineCosts]]


@dataclass(frozen=True)
class Context:
    """`teacher` is the checkpoint the run began with; `work` keeps what a killed stage needs to go on.

    `costs_in` measures in an engine, where the run has one; what a stage puts into `notes` stands in its record.
    """

    seed: int
    work: Path
    teacher: Checkpoint
    data: Data | None = None
    costs_in: CostsIn | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        """Where the run keeps what is to be looked at: DIR/logs/STAGE for what works in DIR/stages/.STAGE.work."""
        return self.work.parent.parent / "logs" / self.work.name.removeprefix(".").removesuffix(".work")

    def require_data(self, purpose: str) -> Data:
        if self.data is None:
            raise InvalidInputError(f"{purpose} needs images: set 'data: FILE.npz' in the recipe")
        return self.data

    def conditions(self, count: int) -> ConditioningInputs:
        """What `count` samples are told while the model samples for calibration."""
        return dummy_conditioning(self.teacher.spec, count) if self.data is None else self.data.conditions(count)


def say(text: str) -> None:
    if is_main():
        print(f"  {text}", flush=True)
