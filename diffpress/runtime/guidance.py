"""Classifier-free guidance: where it acts and how many network evaluations it takes."""

from __future__ import annotations

import numpy as np

from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.spec import DenoiserSpec

Interval = tuple[float, float | None]


def rescaled(mixed: np.ndarray, label: np.ndarray, phi: float) -> np.ndarray:
    """Guided outputs [N, ...] with their spread brought `phi` of the way back to that of the label half."""
    axes = tuple(range(1, mixed.ndim))
    spread, wanted = (array.std(axis=axes, keepdims=True) for array in (mixed, label))
    result: np.ndarray = mixed * (phi * wanted / np.maximum(spread, np.finfo(np.float32).tiny) + (1.0 - phi))
    return result


def is_guided(spec: DenoiserSpec, guidance: float) -> bool:
    """Whether this weight takes two network evaluations: 1 leaves the given half alone."""
    return guidance != 1.0 and not spec.conditioning.guidance_input


def evaluations_per_step(spec: DenoiserSpec) -> int:
    """Network evaluations for one call for one sample by the spec's plan: two under guidance, where it acts."""
    return 2 if is_guided(spec, spec.plan.guidance) else 1


def evaluations_at(spec: DenoiserSpec, level: NoiseLevel) -> int:
    """As `evaluations_per_step`, at this point: outside the guidance interval it is one."""
    return evaluations_per_step(spec) if guidance_acts(spec.plan.guidance_interval, level) else 1


def guidance_acts(interval: Interval | None, level: NoiseLevel) -> bool:
    """Whether guidance acts there: low < sigma / alpha <= high."""
    if interval is None:
        return True
    low, high = interval
    return level.sigma > low * level.alpha and (high is None or level.sigma <= high * level.alpha)
