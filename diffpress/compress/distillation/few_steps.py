"""Shared by all few-step students: their timesteps and plan, and x_0 at the levels of a plan.

The N timesteps are even in t, and the first is where solvers start (LOG_RATIO_MAX), as in LCM, SDXL-Lightning and
DMD2. With two steps, the second then starts at r = sigma / alpha = 1 for a cosine schedule and 2 for Stable
Diffusion's, where part of the image is still undecided. Spacings even in a power or the logarithm of r start it at 5
or more, which is almost pure noise: two such steps do little more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from diffpress.compress.training.losses import NoiseLevelBatch, Tensors, forward, per_sample
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import LOG_RATIO_MAX, LOG_RATIO_MIN, timesteps_for

MIN_GAP_DIVISOR = 125  # plans differ by 1/125 of the timesteps or more, so that a network can distinguish them


def few_timesteps(steps: int, schedule: NoiseSchedule) -> tuple[float, ...]:
    """Return `steps` integer timesteps for a student, descending (see the module docstring)."""
    first, *rest = timesteps_for("trailing", steps, schedule)
    (solver_start,) = timesteps_for("karras", 1, schedule)  # the timestep at LOG_RATIO_MAX, where solvers start
    is_fine = bool(rest) and rest[0] >= solver_start
    return (first if is_fine else min(first, solver_start), *rest)


def disjoint_timesteps(counts: Sequence[int], schedule: NoiseSchedule) -> list[tuple[float, ...]]:
    """Return `few_timesteps` of several numbers of steps for one student, with no timestep in two plans.

    Steps of different length need different outputs at the same state, and only the timestep identifies the plan to
    the network (SFD-v has a separate input for it). Timesteps of later plans are shifted down where they collide.

    Raises:
        InvalidInputError: The schedule has too few timesteps.
    """
    taken: set[float] = set()
    plans = []
    for count in counts:
        timesteps = []
        for t in few_timesteps(count, schedule):
            while t in taken:
                t -= max(1, len(schedule) // MIN_GAP_DIVISOR)
            timesteps.append(t)
        if timesteps != sorted(set(timesteps), reverse=True) or timesteps[-1] < 0:
            others = ", ".join(str(other) for other in counts if other != count)
            raise InvalidInputError(
                f"other_steps: a plan of {count} steps cannot avoid the timesteps of {others} steps in a schedule of "
                f"{len(schedule)} timesteps; use fewer steps"
            )
        taken.update(timesteps)
        plans.append(tuple(timesteps))
    return plans


def student_spec(
    spec: DenoiserSpec,
    kind: str,
    solver: str,
    timesteps: tuple[float, ...],
    others: tuple[tuple[float, ...], ...] = (),
) -> DenoiserSpec:
    """Return the spec of a student whose plan takes one evaluation per step, without guidance.

    Args:
        spec: Spec to derive it from. If the guidance weight is an input of the network, the plan keeps its value.
        kind: Kind of distillation.
        solver: Solver of the plan.
        timesteps: Timesteps of the plan.
        others: Timesteps of the further plans that the student was trained for.
    """
    weight = spec.plan.guidance if spec.conditioning.guidance_input else 1.0
    plan = SamplingPlan(solver, timesteps, guidance=weight, clip=spec.plan.clip, start=spec.plan.start)
    return replace(spec, plan=plan, distilled=kind, distilled_timesteps=others)


def refine_plan(
    plan: SamplingPlan, timesteps: tuple[float, ...], steps: int, schedule: NoiseSchedule
) -> tuple[SamplingPlan, tuple[int, ...]]:
    """Refine `timesteps` to about `steps` integer timesteps, even in log-SNR between them.

    Each interval gets a number of steps in proportion to its length in log-SNR, at least one, and fewer if it does
    not contain as many integer timesteps.

    Returns:
        `plan` over the fine timesteps, and the indices of `timesteps` among them.
    """
    ratios = np.clip(log_ratios(schedule), LOG_RATIO_MIN, LOG_RATIO_MAX)
    marks = [*(float(ratios[round(t)]) for t in timesteps), float(ratios[0])]
    found: list[float] = []
    kept = []
    for start, stop, (high, low) in zip(timesteps, (*timesteps[1:], -1.0), pairwise(marks), strict=True):
        interval_steps = max(1, math.ceil(steps * (high - low) / (marks[0] - marks[-1]) - 1e-9))
        # the last interval includes the least noisy timestep, the others exclude their end
        ramp = np.linspace(high, low, interval_steps if stop < 0 else interval_steps + 1)
        inner = {round(float(t)) for t in np.interp(ramp, ratios, np.arange(len(schedule)))}
        kept.append(len(found))
        found += [float(t) for t in sorted(inner | {round(start)}, reverse=True) if stop < t <= start]
    return replace(plan.over(tuple(found)).without_corrections, eta=0.0, cache=None), tuple(kept)


def log_ratios(schedule: NoiseSchedule) -> np.ndarray:
    """Return log(sigma / alpha) of every timestep, finite and increasing, float64 [T]."""
    alphas, sigmas = np.asarray(schedule.alphas), np.asarray(schedule.sigmas)
    return np.log(np.maximum(sigmas, 1e-8)) - np.log(np.maximum(alphas, 1e-8))


def gather_levels(levels: tuple[NoiseLevel, ...], index: torch.Tensor, rank: int) -> NoiseLevelBatch:
    """Return the levels at `index`, int64 [B], on its device, for samples with `rank` dimensions."""
    t, alpha, sigma = _table(levels, index.device)[index].unbind(1)
    return NoiseLevelBatch(t.round().long(), per_sample(alpha, rank), per_sample(sigma, rank))


def expand_level(levels: tuple[NoiseLevel, ...], number: int, x: torch.Tensor) -> NoiseLevelBatch:
    """Return the level at `number` for every sample of `x` [B, ...], on its device."""
    return gather_levels(levels, torch.full((len(x),), number, device=x.device), x.dim() - 1)


@lru_cache(maxsize=32)
def _table(levels: tuple[NoiseLevel, ...], device: torch.device) -> torch.Tensor:
    """Return the levels as float32 [P, 3]; cached, since a CUDA graph capture cannot copy to the device."""
    return torch.tensor(levels, dtype=torch.float32).to(device)


def clip_x0(spec: DenoiserSpec, x0: torch.Tensor) -> torch.Tensor:
    """Clip x_0 to the data range if the plan clips, with a straight-through gradient."""
    if not spec.plan.clip:
        return x0
    return x0 + (x0.clamp(*spec.data_range) - x0).detach()


def predict_x0(
    model: nn.Module, spec: DenoiserSpec, x: torch.Tensor, here: NoiseLevelBatch, cond: Tensors
) -> torch.Tensor:
    """Return the model's x_0 at x, [B, ...], clipped if the plan clips."""
    out = forward(model, spec, x, here.t, cond)
    return clip_x0(spec, to_x0(spec.prediction, x, out, here))
