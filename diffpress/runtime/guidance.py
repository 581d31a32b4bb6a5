"""Classifier-free guidance (Ho & Salimans 2022): when it applies, what it costs, and how it is rescaled.

    out        uncond + w (cond - uncond)
    rescaled   out (phi std(cond) / std(out) + 1 - phi)     w increases the standard deviation of out, phi restores that
                                                            of cond (Lin et al. 2024, eq. 15-16)
    interval   out where low < sigma / alpha <= high, cond elsewhere                       (Kynkaanniemi et al. 2024)

Guidance applies for w > 1. A guided step takes two network evaluations per sample, unless the weight is an input of the
network.
"""

from __future__ import annotations

import numpy as np

from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.spec import DenoiserSpec

Interval = tuple[float, float | None]


def rescaled(mixed: np.ndarray, cond: np.ndarray, phi: float) -> np.ndarray:
    """Rescale guided outputs [N, ...] by `phi` towards the standard deviation of the cond half, per sample."""
    axes = tuple(range(1, mixed.ndim))
    mixed_std, cond_std = (array.std(axis=axes, keepdims=True) for array in (mixed, cond))
    result: np.ndarray = mixed * (phi * cond_std / np.maximum(mixed_std, np.finfo(np.float32).tiny) + (1.0 - phi))
    return result


def is_guided(spec: DenoiserSpec, guidance: float) -> bool:
    """Whether this guidance weight needs two evaluations; a weight of 1 or less needs the cond half only.

    diffusers' pipelines guide only above 1: few-step models are sampled with a weight of 0, which means no guidance.
    """
    return guidance > 1.0 and not spec.conditioning.guidance_input


def evaluations_per_step(spec: DenoiserSpec) -> int:
    """Return the network evaluations per sample and noise level under the spec's plan: 2 with guidance, else 1."""
    return 2 if is_guided(spec, spec.plan.guidance) else 1


def evaluations_at(spec: DenoiserSpec, level: NoiseLevel) -> int:
    """Return `evaluations_per_step` at this noise level: 1 outside the guidance interval."""
    return evaluations_per_step(spec) if guidance_applies(spec.plan.guidance_interval, level) else 1


def guidance_applies(interval: Interval | None, level: NoiseLevel) -> bool:
    """Whether guidance applies at this noise level: low < sigma / alpha <= high."""
    if interval is None:
        return True
    low, high = interval
    return level.sigma > low * level.alpha and (high is None or level.sigma <= high * level.alpha)
