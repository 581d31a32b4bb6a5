"""Training data made by the teacher itself, for models of latents and of text, and where there are no images.

    sample i = what the teacher makes by its own plan under prompt i (class i, ...) from seed i

Prompts come from the recipe's `data: FILE.txt`, one a line, else from calib_data/prompts.txt. Nothing is sampled before
a stage asks for a batch, and what was sampled is kept in the run's folder: a run that was killed does not sample again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from diffpress.compress.builtin import PROMPTS
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context, Data, say
from diffpress.compress.models.components import encoded_prompts
from diffpress.compress.training.teacher_trajectories import TeacherTrajectories
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.network_inputs import ConditioningInputs, dummy_conditioning

SEED = 2_000_000  # far from the seeds that people sample, calibrate and evaluate with

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TeacherData:
    """`count` samples of the teacher, with what it was told; kept in `cache` and read from there batch by batch."""

    teacher: Checkpoint
    count: int
    cache: Path
    prompts: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        facts = [self.teacher.hash, self.count, SEED, list(self.prompts)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def make(self) -> None:
        """Sample now what was not sampled before, several processes together."""
        self._paths.make()

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, Tensors]:
        """A random batch: float32 [B, C, H, W], and the conditions [B, ...] by input name."""
        states, cond = self._paths.batch(size, generator)
        return states[:, -1], cond

    @cached_property
    def uncond(self) -> Tensors:
        """The conditions of the unconditional half, [1, ...] by input name; empty where there is none."""
        uncond = self._network_conditioning.uncond or {}
        return {name: torch.from_numpy(array[:1]) for name, array in uncond.items()}

    def conditions(self, count: int) -> ConditioningInputs:
        """What `count` samples are told: the prompts in turn, the classes in turn, or nothing."""
        spec = self.teacher.spec
        if spec.conditioning.kind != "text":
            return dummy_conditioning(spec, count)
        if not spec.conditioning.encoders:
            say("the model came without its text encoders: noise stands in for encoded prompts")
            return dummy_conditioning(spec, count)
        prompts = [self.prompts[i % len(self.prompts)] for i in range(count)]
        cond = encoded_prompts(self.teacher, prompts, warn=say)
        if not is_guided(spec, spec.plan.guidance):
            return ConditioningInputs(cond)
        uncond = encoded_prompts(self.teacher, None, warn=say)
        return ConditioningInputs(cond, {name: np.repeat(array, count, axis=0) for name, array in uncond.items()})

    @cached_property
    def _network_conditioning(self) -> ConditioningInputs:
        return self.conditions(self.count)

    @cached_property
    def _paths(self) -> TeacherTrajectories:
        return TeacherTrajectories(
            self.teacher, self.teacher.spec.plan, (), self.count, self._network_conditioning, SEED, self.cache
        )


def data_for(ctx: Context, count: int) -> Data:
    """What the run learns from, made where it has to be; where it was given nothing, `count` samples of its teacher."""
    data = ctx.data
    if data is None:
        prompts = read_prompts(None) if ctx.teacher.spec.conditioning.kind == "text" else ()
        data = TeacherData(ctx.teacher, count, ctx.work.parent, prompts)
    if isinstance(data, TeacherData):
        data.make()
    return data


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """The prompts of a text file, one a line; None takes the built-in ones."""
    file = path or PROMPTS
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file}: not readable as a text file of prompts ({error})") from error
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise InvalidInputError(f"{file}: holds no prompts; write one a line")
    return prompts
