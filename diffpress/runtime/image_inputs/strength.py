"""Strength: which steps of a plan are run when sampling starts from an image, by the rules of diffusers' pipelines.

    steps that remain of N          variance preserving  floor(N strength)        flow  ceil(N strength)

The solver starts there with an empty history; steps are counted as in the whole plan. diffusers' pipeline of latent
consistency models takes N new steps from the lowest `strength` of the trained timesteps instead. A step cache is left
out: it was measured from noise on, and a forecast knows nothing of a mask.
"""

from __future__ import annotations

import math

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.json_fields import floats
from diffpress.runtime.noise_schedule import is_flow
from diffpress.runtime.requested_plan import warn_of_lost_cache
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import lcm_timesteps

STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # defaults: diffusers' for Stable Diffusion, without and with a mask


def check_strength(strength: float, name: str) -> None:
    """Raise InvalidInputError if a strength is outside (0, 1]; `name` is what the user calls it."""
    if not (isinstance(strength, int | float) and 0.0 < strength <= 1.0):  # false for NaN as well
        raise InvalidInputError(f"{name} {strength}: must be a number above 0 and not above 1; 1 runs every step")


def with_strength(spec: DenoiserSpec, strength: float, name: str = "strength") -> tuple[DenoiserSpec, int]:
    """Return the spec, with the plan for this strength, and the index of the first step that is run.

    Raises:
        InvalidInputError: No step remains, or a network with fixed timesteps does not support the new ones.
    """
    plan, steps = spec.plan.without_cache, spec.plan.steps
    warn_of_lost_cache(spec, plan)
    spec = spec.with_plan(plan)
    if _is_lcm(spec):
        return spec.with_plan(plan.over(floats(lcm_timesteps(steps, spec.schedule, spec.spacing.count, strength)))), 0
    if is_flow(spec.schedule):
        first = int(steps - min(steps * strength, steps))
    else:
        first = steps - min(int(steps * strength), steps)
    if first == steps:
        least = math.ceil(1e3 / steps) / 1e3
        raise InvalidInputError(
            f"{name} {strength:g}: none of the plan's {steps} step{'s' * (steps > 1)} remains; use at least {least:g}, "
            "or more steps"
        )
    return spec, first


def _is_lcm(spec: DenoiserSpec) -> bool:
    """Whether diffusers samples the plan with its pipeline of latent consistency models, which SDXL's are not for."""
    conditioning, plan = spec.conditioning, spec.plan
    if spec.spacing.kind != "lcm" or not conditioning.guidance_input or len(conditioning.inputs) != 1:
        return False
    own = lcm_timesteps(plan.steps, spec.schedule, spec.spacing.count)
    return np.array_equal(own, plan.timesteps)
