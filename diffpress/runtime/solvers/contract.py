"""The contract of every solver: the state of one step in, the next sample out.

With x = alpha x_0 + sigma eps for the network's current x_0, and primes for the next noise level, every solver makes
the same move along the line that x_0 defines (Song et al. 2021, eq. 12 without fresh noise),

    transfer(x, x_0) = alpha' x_0 + (sigma' / sigma) (x - alpha x_0)

with another estimate of x_0, or with noise added. With r = sigma / alpha and lambda = -log r, a step spans
h = lambda' - lambda. No division by alpha happens where it may be zero, so sampling can start from pure noise.

A solver that adds noise moves to a lower noise level and adds fresh noise c z, with sigma'^2 = kept^2 + c^2 and

    c = eta (sigma' / sigma) sqrt(sigma^2 - (alpha sigma' / alpha')^2)

For alpha^2 + sigma^2 = 1 this is eq. 16 of the paper. With eta = 1 it is the posterior of DDPM, the ancestral step of
k-diffusion, and the exact solution of the diffusion SDE for constant x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule
from diffpress.runtime.parameterization import transfer
from diffpress.runtime.timesteps import LOG_RATIO_MAX

if TYPE_CHECKING:
    from diffpress.runtime.denoiser import Denoise

FEW_STEPS = 15  # with fewer steps, diffusers' multistep solvers end with lower orders (`lower_order_final`)
MAX_HISTORY = 3  # most earlier steps that any solver uses


class PreviousStep(NamedTuple):
    """An earlier step: its noise level, the sample there (after the solver's corrector) and the network's x_0."""

    level: NoiseLevel
    x: np.ndarray
    x0: np.ndarray


class StepState(NamedTuple):
    """Input of a solver step from noise level `now` to `next`.

    Attributes:
        x: The sample.
        x0: The network's x_0 for it.
        now: Its noise level.
        next: The noise level to move to.
        history: Up to MAX_HISTORY earlier steps, the latest last.
        index: Index of this step.
        steps: Number of steps.
        denoise: Evaluates the denoiser again, at any noise level of `schedule`.
        noise: noise(k) is fresh unit noise shaped like x, independent for every k.
        eta: Share of fresh noise in DDIM.
        schedule: Noise schedule.
    """

    x: np.ndarray
    x0: np.ndarray
    now: NoiseLevel
    next: NoiseLevel
    history: Sequence[PreviousStep]
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    steps: int
    denoise: Denoise
    noise: Callable[[int], np.ndarray]
    eta: float
    schedule: NoiseSchedule

    @property
    def is_last(self) -> bool:
        """Whether this is the last step."""
        return self.index == self.steps - 1


Move = Callable[[StepState], np.ndarray]


def one_per_step(steps: int) -> int:
    """Return the evaluations of a solver with one per step."""
    return steps


def two_per_step_except_last(steps: int) -> int:
    """Return the evaluations of a solver with two per step and one in the last."""
    return 2 * steps - 1


@dataclass(frozen=True)
class Solver:
    """A solver.

    Attributes:
        move: Returns the next sample.
        correct: Corrector: returns an improved current sample, applied before `move`.
        evaluations: Number of denoiser evaluations for a number of steps.
        noisy: Whether the solver adds noise for any eta.
    """

    move: Move
    correct: Move | None = None
    evaluations: Callable[[int], int] = one_per_step
    noisy: bool = False


def noisy_transfer(step: StepState, x0: np.ndarray, eta: float) -> np.ndarray:
    """Return the transfer of the step with this x_0, with eta's share of the noise replaced by fresh noise."""
    goal, fresh = split_noise(step.now, step.next, eta)
    moved = transfer(step.x, x0, step.now, goal)
    return moved + fresh * step.noise(0) if fresh > 0 else moved


def split_noise(now: NoiseLevel, next: NoiseLevel, eta: float) -> tuple[NoiseLevel, float]:
    """Return the next noise level with the kept noise alone, and the scale c of the fresh noise (see above)."""
    if eta == 0.0 or next.sigma == 0.0 or next.alpha == 0.0 or now.sigma == 0.0:
        return next, 0.0
    fresh = eta * next.sigma / now.sigma * math.sqrt(removed_variance(now, next))
    return next._replace(sigma=math.sqrt(max(next.sigma**2 - fresh**2, 0.0))), fresh


def removed_variance(now: NoiseLevel, next: NoiseLevel) -> float:
    """Return sigma^2 - (alpha sigma' / alpha')^2, the variance that the forward process adds: DDPM's beta."""
    return max(now.sigma**2 - (now.alpha / next.alpha * next.sigma) ** 2, 0.0)


def half_log_snr(level: NoiseLevel) -> float:
    """Return lambda = log(alpha / sigma): minus infinity at pure noise, plus infinity at a clean sample."""
    if level.sigma == 0.0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf


def is_pure_noise(level: NoiseLevel) -> bool:
    """Whether r is infinite or too high for derivatives in r to be meaningful, as at the end of a cosine schedule."""
    return level.sigma > math.exp(LOG_RATIO_MAX) * level.alpha


def final_order(step: StepState, order: int) -> int:
    """Return the order that diffusers' multistep solvers use in this step: lower near the end of few steps."""
    return min(order, step.steps - step.index) if step.steps < FEW_STEPS else order
