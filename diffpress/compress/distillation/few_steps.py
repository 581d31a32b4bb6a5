"""What students of few steps share: where they step, and one step of theirs as torch computes it.

    x_0 = what the output implies at x = alpha x_0 + sigma eps     (diffpress.runtime.parameterization.to_x0)
    x'  = alpha' x_0 + (sigma' / sigma) (x - alpha x_0)            (diffpress.runtime.solvers.transfer: deterministic DDIM)

The timesteps of N steps are even in t, the first of them where an image begins to be seen, as those of LCM,
SDXL-Lightning and DMD2 are. Half of the way of two steps is then r = sigma / alpha of 1 for a cosine table and 2 for
Stable Diffusion's, where there is still something to be decided. Grids even in a power or the logarithm of r put it at
5 and more, next to nothing but noise: their two steps do little more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from diffpress.compress.training.losses import Tensors, forward
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import LOG_RATIO_MAX, LOG_RATIO_MIN, timesteps_for

TELLING = 125  # the share of all timesteps by which two plans must differ for a network to tell them apart


def few_timesteps(steps: int, schedule: NoiseSchedule) -> tuple[float, ...]:
    """`steps` whole timesteps for a student: see the top of this file."""
    first, *rest = timesteps_for("trailing", steps, schedule)
    (seen,) = timesteps_for("karras", 1, schedule)  # which begins at the noise where solvers do (LOG_RATIO_MAX)
    many = bool(rest) and rest[0] >= seen
    return (first if many else min(first, seen), *rest)


def plans_apart(counts: Sequence[int], schedule: NoiseSchedule) -> list[tuple[float, ...]]:
    """`few_timesteps` of several numbers of steps for one student, no timestep in two of them.

    From the same noise long and short steps need other images, and the timestep is all that tells the network which
    plan it walks (SFD-v gives it an input of its own for that). Later plans give way, downwards. Raises InvalidInputError where
    the schedule has no room for that.
    """
    taken: set[float] = set()
    plans = []
    for count in counts:
        timesteps = []
        for t in few_timesteps(count, schedule):
            while t in taken:
                t -= max(1, len(schedule) // TELLING)
            timesteps.append(t)
        if timesteps != sorted(set(timesteps), reverse=True) or timesteps[-1] < 0:
            others = ", ".join(str(other) for other in counts if other != count)
            raise InvalidInputError(
                f"other_steps: {count} steps find no place beside {others} among {len(schedule)} timesteps"
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
    """The spec of a student that `kind` taught to sample by this plan alone: one call a step, without guidance.

    `others` are the timesteps of further plans that it was taught. A weight that is an input stays as it was.
    """
    weight = spec.plan.guidance if spec.conditioning.guidance_input else 1.0
    plan = SamplingPlan(solver, timesteps, guidance=weight, clip=spec.plan.clip, start=spec.plan.start)
    return replace(spec, plan=plan, distilled=kind, distilled_timesteps=others)


def refined(
    plan: SamplingPlan, timesteps: tuple[float, ...], steps: int, schedule: NoiseSchedule
) -> tuple[SamplingPlan, tuple[int, ...]]:
    """`plan` over some `steps` timesteps, even in log-SNR between `timesteps`, and at which of its steps those are.

    Each way between two gets its share of the steps, by its length in log-SNR, one at least. Whole timesteps: where
    there are not so many between two, there are fewer steps.
    """
    ratios = np.clip(log_ratios(schedule), LOG_RATIO_MIN, LOG_RATIO_MAX)
    marks = [*(float(ratios[round(t)]) for t in timesteps), float(ratios[0])]
    found: list[float] = []
    kept = []
    for start, stop, (high, low) in zip(timesteps, (*timesteps[1:], -1.0), pairwise(marks), strict=True):
        each = max(1, math.ceil(steps * (high - low) / (marks[0] - marks[-1]) - 1e-9))
        # the way to the clean end stops at the least noisy timestep and goes on from there; the others stop short
        ramp = np.linspace(high, low, each if stop < 0 else each + 1)
        inner = {round(float(t)) for t in np.interp(ramp, ratios, np.arange(len(schedule)))}
        kept.append(len(found))
        found += [float(t) for t in sorted(inner | {round(start)}, reverse=True) if stop < t <= start]
    return replace(plan.without_corrections, timesteps=tuple(found), eta=0.0), tuple(kept)


def log_ratios(schedule: NoiseSchedule) -> np.ndarray:
    """log(sigma / alpha) of every timestep, finite and rising."""
    alphas, sigmas = np.asarray(schedule.alphas), np.asarray(schedule.sigmas)
    return np.log(np.maximum(sigmas, 1e-8)) - np.log(np.maximum(alphas, 1e-8))


class Places(NamedTuple):
    """Where each sample of a batch is: timesteps int64 [B]; alpha and sigma float32 [B, 1, 1, 1]."""

    t: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor


def places(levels: tuple[NoiseLevel, ...], index: torch.Tensor) -> Places:
    """The points of those numbers, int64 [B], on their device."""
    t, alpha, sigma = _table(levels, index.device)[index].unbind(1)
    return Places(t.round().long(), alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1))


def place(levels: tuple[NoiseLevel, ...], number: int, x: torch.Tensor) -> Places:
    """One of the points for all of a batch, on the device of `x` [B, ...]."""
    return places(levels, torch.full((len(x),), number, device=x.device))


@lru_cache(maxsize=32)
def _table(levels: tuple[NoiseLevel, ...], device: torch.device) -> torch.Tensor:
    """float32 [P, 3]; moved to the device once, which a step that is captured cannot do."""
    return torch.tensor(levels, dtype=torch.float32).to(device)


def x0_of(
    spec: DenoiserSpec, out: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """x_0 from the output [B, C, H, W] at x; `alpha` and `sigma` broadcast to it."""
    if spec.prediction == "sample":
        return out
    if spec.prediction == "v":
        return (alpha * x - sigma * out) / (alpha**2 + sigma**2)
    if spec.prediction == "flow":
        return (x - sigma * out) / (alpha + sigma)
    return (x - sigma * out) / alpha.clamp_min(1e-4)


def clipped(spec: DenoiserSpec, x0: torch.Tensor) -> torch.Tensor:
    """x_0 within the data range where the plan clips, with the gradient it would have had outside."""
    if not spec.plan.clip:
        return x0
    return x0 + (x0.clamp(*spec.data_range) - x0).detach()


def predicted_x0(model: nn.Module, spec: DenoiserSpec, x: torch.Tensor, here: Places, cond: Tensors) -> torch.Tensor:
    """The model's x_0, [B, C, H, W], clipped as the plan says."""
    out = forward(model, spec, x, here.t, cond)
    return clipped(spec, x0_of(spec, out, x, here.alpha, here.sigma))


def transfer(x: torch.Tensor, x0: torch.Tensor, here: Places, there: Places) -> torch.Tensor:
    """The deterministic step along the line that x_0 defines."""
    kept = there.sigma / here.sigma
    return (there.alpha - kept * here.alpha) * x0 + kept * x


def implied_x0(x: torch.Tensor, moved: torch.Tensor, here: Places, there: Places) -> torch.Tensor:
    """The x_0 with which `transfer` leads from x to `moved`."""
    kept = there.sigma / here.sigma
    return (moved - kept * x) / (there.alpha - kept * here.alpha)
