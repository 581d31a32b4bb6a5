"""Training data sampled from the teacher, for latent and text models and recipes without data.

    sample i = the teacher's sample under its own plan, with prompt i (class i, ...) and seed TEACHER_DATA_SEED + i

Prompts come from the recipe's `data: FILE.txt`, one per line, or else from calib_data/prompts.txt. Samples are
generated when a stage first needs them and are kept in the run's folder, so a resumed run does not generate them again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from diffpress.compress.builtin import PROMPTS
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context, Data, random_conditioning
from diffpress.compress.models.components import prompt_conditions
from diffpress.compress.seeds import TEACHER_DATA_SEED
from diffpress.compress.training.captioned_images import has_captions, read_captions
from diffpress.compress.training.teacher_trajectories import TeacherTrajectories
from diffpress.runtime.io.prompt_file import read_prompt_file
from diffpress.runtime.network_inputs import ConditioningInputs

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TeacherData:
    """Samples of the teacher with their conditioning, read from the cache batch by batch.

    Attributes:
        teacher: The checkpoint to sample from.
        count: Number of samples.
        cache: Folder of the samples.
        prompts: Prompts of a text-conditional model, used in turn.
    """

    teacher: Checkpoint
    count: int
    cache: Path
    prompts: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """Hash of everything that determines the samples."""
        inputs = [self.teacher.hash, self.count, TEACHER_DATA_SEED, list(self.prompts)]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def generate(self) -> None:
        """Generate the samples that are not in the cache, divided among the processes."""
        self._trajectories.generate()

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, Tensors]:
        """Draw a random batch: samples, float32 [B, ...], and their conditioning [B, ...] by name."""
        states, cond = self._trajectories.batch(size, generator)
        return states[:, -1], cond

    @cached_property
    def uncond(self) -> Tensors:
        """The unconditional inputs, [1, ...] by name; empty if there are none."""
        uncond = self._conditioning.uncond or {}
        return {name: torch.from_numpy(array[:1]) for name, array in uncond.items()}

    def conditions(self, count: int) -> ConditioningInputs:
        """Return the conditioning of `count` samples: the prompts in turn, the classes in turn, or none."""
        spec = self.teacher.spec
        if not spec.conditioning.encoders:
            return random_conditioning(spec, count)
        return prompt_conditions(self.teacher, [self.prompts[i % len(self.prompts)] for i in range(count)])

    @cached_property
    def _conditioning(self) -> ConditioningInputs:
        return self.conditions(self.count)

    @cached_property
    def _trajectories(self) -> TeacherTrajectories:
        return TeacherTrajectories(
            self.teacher, self.teacher.spec.plan, (), self.count, self._conditioning, TEACHER_DATA_SEED, self.cache
        )


def data_for(ctx: Context, count: int) -> Data:
    """Return the run's training data, or `count` samples of its teacher if the recipe has no data."""
    data = ctx.data
    if data is None:
        prompts = read_prompts(None) if ctx.teacher.spec.conditioning.kind == "text" else ()
        data = TeacherData(ctx.teacher, count, ctx.samples, prompts)
    if isinstance(data, TeacherData):
        data.generate()
    return data


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Read the prompts of a text file, one per line, or the captions of an npz file; None reads the built-in ones.

    Raises:
        InvalidInputError: The file is unreadable or contains no prompts.
    """
    if path is not None and has_captions(path):
        return read_captions(path)
    return read_prompt_file(path or PROMPTS)
