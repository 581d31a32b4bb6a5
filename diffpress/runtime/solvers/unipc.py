"""UniPC: predictor and corrector of any order at one evaluation per step (Zhao et al. 2023, algorithms 5 and 6, B2(h)).

    predictor   x'  = transfer(x, x_0)  - alpha' B sum_k rho_k D_k
    corrector   x_c = transfer(x_before, x_0_before) - alpha B (sum_k rho_k D_k + rho (x_0 - x_0_before))

D_k = (x_0_k - x_0) / r_k are slopes to earlier x_0 at r_k = (lambda_k - lambda) / h, in the corrector all one step
earlier; B = e^-h - 1, or -h in the variant B1 (`bh1`). The rho solve (eq. 5)

    sum_k r_k^(i-1) rho_k = i! phi_(i+1)(-h) (-h) / B     for i = 1, 2, ...

with the last r = 1 for the corrector; with one unknown it is 1/2. The corrector improves the current sample with the
x_0 that the next predictor needs anyway, so it takes no extra evaluation. Orders are lower at the start and at the end,
where the last step ends at x_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.parameterization import transfer
from diffpress.runtime.solvers.contract import PreviousStep, StepState

# diffusers starts flows at 1e-6 below pure noise, where lambda is finite
LEAST_ALPHA = 1e-6


def predict(order: int, step: StepState, bh1: bool = False) -> np.ndarray:
    """Predict the next sample with this order, or lower with too few earlier steps."""
    plain = transfer(step.x, step.x0, step.now, step.next)
    h = _lambda(step.next) - _lambda(step.now)
    history = _reach(step.history, min(order, step.steps - step.index))
    if not history or not math.isfinite(h) or h <= 0.0:
        return plain
    ratios, slopes = _slopes(history, PreviousStep(step.now, step.x, step.x0), h)
    # shortcut of diffusers and the authors for second order
    rhos = (0.5,) if len(ratios) == 1 else _rhos(ratios, h, bh1)
    return plain - step.next.alpha * _scale(h, bh1) * _mix(rhos, slopes)


def correct(order: int, step: StepState, bh1: bool = False) -> np.ndarray:
    """Correct the current sample with the network's x_0 for it."""
    if not step.history:
        return step.x
    *earlier, last = step.history
    h = _lambda(step.now) - _lambda(last.level)
    if not math.isfinite(h) or h <= 0.0:
        return step.x
    history = _reach(earlier, min(order, step.steps - step.index + 1))
    ratios, slopes = _slopes(history, last, h)
    rhos = _rhos((*ratios, 1.0), h, bh1) if ratios else (0.5,)
    uncorrected = transfer(last.x, last.x0, last.level, step.now)
    return uncorrected - step.now.alpha * _scale(h, bh1) * _mix(rhos, [*slopes, step.x0 - last.x0])


def _reach(history: Sequence[PreviousStep], order: int) -> Sequence[PreviousStep]:
    """The earlier steps that a method of this order uses, the latest first."""
    return list(reversed(history))[: order - 1]


def _slopes(
    history: Sequence[PreviousStep], base: PreviousStep, h: float
) -> tuple[tuple[float, ...], list[np.ndarray]]:
    ratios = tuple((_lambda(before.level) - _lambda(base.level)) / h for before in history)
    return ratios, [(before.x0 - base.x0) / r for before, r in zip(history, ratios, strict=True)]


@lru_cache(maxsize=1024)  # plans are reused, and solving takes longer than the rest of the step
def _rhos(ratios: tuple[float, ...], h: float, bh1: bool) -> tuple[float, ...]:
    """Solve eq. 5 for as many weights as there are ratios."""
    rows, targets = [], []
    phi = math.expm1(-h) / -h - 1.0
    for i in range(1, len(ratios) + 1):
        rows.append(np.power(ratios, i - 1))
        targets.append(phi * math.factorial(i) / _scale(h, bh1))
        phi = phi / -h - 1.0 / math.factorial(i + 1)
    return tuple(float(rho) for rho in np.linalg.solve(np.stack(rows), targets))


def _scale(h: float, bh1: bool) -> float:
    return -h if bh1 else math.expm1(-h)


def _mix(weights: Sequence[float], slopes: Sequence[np.ndarray]) -> np.ndarray:
    first, *rest = (weight * slope for weight, slope in zip(weights, slopes, strict=True))
    return np.asarray(sum(rest, start=first))


def _lambda(level: NoiseLevel) -> float:
    return math.log(max(level.alpha, LEAST_ALPHA) / level.sigma) if level.sigma > 0 else math.inf
