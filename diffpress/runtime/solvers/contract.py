"""The contract of every solver: the facts of one step in, the next sample out.

Writing x = alpha x_0 + sigma eps for the network's guess x_0 at hand, and primes for the next point, every solver is
the same move along the line that x_0 defines (Song et al. 2021, eq. 12 without fresh noise),

    transfer(x, x_0) = alpha' x_0 + (sigma' / sigma) (x - alpha x_0)

with another guess put in, or with noise added. In terms of r = sigma / alpha and lambda = -log r a step spans
h = lambda' - lambda. Nothing is divided by an alpha that may be zero: pure noise (alpha = 0) is a fine start.

A solver that adds noise goes to a point with less of it, and fills up with fresh noise c z: sigma'^2 = kept^2 + c^2,

    c = eta (sigma' / sigma) sqrt(sigma^2 - (alpha sigma' / alpha')^2)

which for alpha^2 + sigma^2 = 1 is eq. 16 of the paper, and with eta = 1 the posterior of DDPM, the ancestral step of
k-diffusion, and the exact solution of the diffusion SDE for an x_0 that does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffpress.runtime.denoiser import Denoise
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule
from diffpress.runtime.timesteps import LOG_RATIO_MAX

FEW_STEPS = 15  # below it the multistep solvers of diffusers end with lower orders (`lower_order_final`)
MAX_HISTORY = 3  # how many earlier steps any solver looks back


class PreviousStep(NamedTuple):
    """An earlier step: where it was, the sample there (as its solver corrected it) and the network's x_0."""

    level: NoiseLevel
    x: np.ndarray
    x0: np.ndarray


class StepState(NamedTuple):
    """The facts of one step.

    `history` are up to MAX_HISTORY earlier steps, the latest last; this is number `index` of `steps`. `noise(k)` is fresh unit
    noise shaped like x, another for each k; `denoise` asks the network once more, at any point of the `schedule`.
    """

    x: np.ndarray
    x0: np.ndarray
    now: NoiseLevel
    next: NoiseLevel
    history: Sequence[PreviousStep]
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a step
    steps: int
    denoise: Denoise
    noise: Callable[[int], np.ndarray]
    eta: float
    schedule: NoiseSchedule

    @property
    def is_last(self) -> bool:
        return self.index == self.steps - 1


Move = Callable[[StepState], np.ndarray]


def one_per_step(steps: int) -> int:
    return steps


def two_per_step_but_last(steps: int) -> int:
    return 2 * steps - 1


@dataclass(frozen=True)
class Solver:
    """`move` gives the next sample; `correct`, where there is one, a better sample at hand before that.

    `evaluations` is how often the network is asked over so many steps; a `noisy` solver draws noise whatever eta is.
    """

    move: Move
    correct: Move | None = None
    evaluations: Callable[[int], int] = one_per_step
    noisy: bool = False


def transfer(x: np.ndarray, x0: np.ndarray, now: NoiseLevel, next: NoiseLevel) -> np.ndarray:
    """Alpha' x_0 + (sigma' / sigma)(x - alpha x_0); without noise to begin with, none is left."""
    kept = next.sigma / now.sigma if now.sigma > 0 else 0.0
    return (next.alpha - kept * now.alpha) * x0 + kept * x


def noisy_transfer(step: StepState, x0: np.ndarray, eta: float) -> np.ndarray:
    """The transfer of the step by that x_0, with eta's share of the noise drawn anew."""
    goal, fresh = split_noise(step.now, step.next, eta)
    moved = transfer(step.x, x0, step.now, goal)
    return moved + fresh * step.noise(0) if fresh > 0 else moved


def split_noise(now: NoiseLevel, next: NoiseLevel, eta: float) -> tuple[NoiseLevel, float]:
    """The next point with the noise that is kept on the way, and how much fresh noise fills it up (c above)."""
    if eta == 0.0 or next.sigma == 0.0 or next.alpha == 0.0 or now.sigma == 0.0:
        return next, 0.0
    fresh = eta * next.sigma / now.sigma * math.sqrt(removed_variance(now, next))
    return next._replace(sigma=math.sqrt(max(next.sigma**2 - fresh**2, 0.0))), fresh


def removed_variance(now: NoiseLevel, next: NoiseLevel) -> float:
    """sigma^2 - (alpha sigma' / alpha')^2: what the forward process adds between the two, DDPM's beta."""
    return max(now.sigma**2 - (now.alpha / next.alpha * next.sigma) ** 2, 0.0)


def half_log_snr(level: NoiseLevel) -> float:
    """Lambda = log(alpha / sigma), minus infinity at pure noise and plus infinity at a clean sample."""
    if level.sigma == 0.0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf


def is_all_noise(level: NoiseLevel) -> bool:
    """Whether r is infinite or so high that no slope in r means anything: the end of a cosine table."""
    return level.sigma > math.exp(LOG_RATIO_MAX) * level.alpha


def noise_in(x: np.ndarray, x0: np.ndarray, level: NoiseLevel) -> np.ndarray:
    """Eps = (x - alpha x_0) / sigma."""
    return (x - level.alpha * x0) / level.sigma


def final_order(step: StepState, order: int) -> int:
    """The order that a multistep solver of diffusers allows itself so near the end."""
    return min(order, step.steps - step.index) if step.steps < FEW_STEPS else order
