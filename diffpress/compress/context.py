"""Context of a stage: seed, training data, work folder, and engine measurements."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from diffpress.compress.builtin import PROMPTS
from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.prompt_file import read_prompt_file
from diffpress.runtime.network_inputs import ConditioningInputs, Network, dummy_conditioning
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)


class Data(Protocol):
    """Training data of a stage (sample_data.py, captioned_images.py and teacher_data.py in compress/training)."""

    @property
    def hash(self) -> str:
        """Hash that identifies the data."""
        ...

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of the samples, for models conditioned on text."""
        ...

    @property
    def uncond(self) -> dict[str, torch.Tensor]:
        """Conditioning of the unconditional half of guidance, [1, ...]."""
        ...

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Draw x_0 [size, ...] and its conditioning."""
        ...

    def conditions(self, count: int) -> ConditioningInputs:
        """Return the conditioning of `count` samples."""
        ...


class EngineCosts(Protocol):
    """Latency and size of a quantized or pruned checkpoint, measured in an engine (export/targets/engine_cost.py)."""

    def gains_ms(self, quantization: Quantization) -> dict[str, float]:
        """Return, per module with scales, its time in the float graph minus its time in the quantized graph, in ms."""

    def latency_ratio(self, quantization: Quantization) -> float:
        """Return the latency of one step of the quantized graph divided by that of the float graph."""

    def relative_latency(self, pruned: Checkpoint) -> float:
        """Return the latency of one step of another float checkpoint divided by that of this one's float graph."""

    def layer_times_ms(self, pruned: Checkpoint) -> tuple[dict[str, float], dict[str, float]]:
        """Return layer -> ms of one step in the float graph, and the same in that of another float checkpoint."""

    def cached_latency_ratio(self) -> float:
        """Return the latency of a cached evaluation divided by that of a full one; the plan has cached steps."""

    def size_mib(self, quantization: Quantization) -> float:
        """Return the file size of the quantized graph in MiB."""

    def network(self, quantization: Quantization | None) -> AbstractContextManager[Network]:
        """Open the quantized graph in the engine; None opens the float graph."""


# (float checkpoint, engine name). Passed in by whoever runs the recipe: `compress` does not import `export`.
EngineCostsFactory = Callable[[Checkpoint, str], AbstractContextManager[EngineCosts]]


@dataclass(frozen=True)
class Context:
    """What a stage receives besides its checkpoint and config.

    Attributes:
        seed: Seed of the stage.
        work: Folder for the state from which an interrupted stage resumes.
        teacher: The model to distill from: the recipe's `teacher`, or else the checkpoint that the run started from.
        data: Training data, if the recipe has any.
        open_engine_costs: Opens engine measurements, if an engine is available.
        shared: Folder of samples that the stages of a run share; None keeps them in `work`.
        logs: Folder of TensorBoard logs and previews; None writes none.
        notes: Entries that a stage adds to its history record.
    """

    seed: int
    work: Path
    teacher: Checkpoint
    data: Data | None = None
    open_engine_costs: EngineCostsFactory | None = None
    shared: Path | None = None
    logs: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> Path:
        """Folder of samples of the teacher."""
        return self.shared or self.work

    def require_data(self, purpose: str) -> Data:
        """Return the training data; InvalidInputError naming `purpose` if there is none."""
        if self.data is None:
            raise InvalidInputError(f"{purpose} needs data: set 'data: FILE.npz' in the recipe")
        return self.data

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of the run's data; the built-in ones if it has none."""
        given = () if self.data is None else self.data.prompts
        return given or read_prompt_file(PROMPTS)

    def conditions(self, count: int) -> ConditioningInputs:
        """Return the conditioning of `count` samples generated for calibration."""
        return random_conditioning(self.teacher.spec, count) if self.data is None else self.data.conditions(count)


def random_conditioning(spec: DenoiserSpec, count: int) -> ConditioningInputs:
    """Return the conditioning of samples without data: the classes in turn, or random text inputs and tensors."""
    if spec.conditioning.names and spec.conditioning.kind != "class":
        is_text = spec.conditioning.kind == "text"
        reason = "the model came without its text encoders" if is_text else "no data"
        logger.warning(
            f"{reason}: random values replace {', '.join(spec.conditioning.names)}, so calibration and training see "
            "other inputs than deployment"
        )
    return dummy_conditioning(spec, count)
