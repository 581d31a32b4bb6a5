"""Conversions between x, x_0, eps and the network's output, for numpy arrays and torch tensors alike.

With x = alpha x_0 + sigma eps, x_0 and eps are linear in x and the output `out` (float32 throughout):

    prediction   out                      x_0                                                eps
    epsilon      eps                      (x - sigma out) / alpha                            out
    v            alpha eps - sigma x_0    (alpha x - sigma out) / (alpha^2 + sigma^2)        alpha out + sigma x
    sample       x_0                      out                                                (x - alpha out) / sigma
    flow         eps - x_0                (x - sigma out) / (alpha + sigma)                  x + alpha out

A sampler has one noise level, whose alpha and sigma are floats. Training has one per sample: tensors that broadcast to
x. It draws all levels of the noise schedule, so these tensors are bounded to MIN_DIVISOR before dividing by them.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from diffpress.runtime.errors import InvalidInputError

MIN_DIVISOR = 1e-4

Array = TypeVar("Array", bound=Any)  # np.ndarray or torch.Tensor; the runtime does not import torch


class Level(Protocol):
    """A noise level, or a batch of noise levels: x = alpha x_0 + sigma eps at timestep t."""

    @property
    def t(self) -> Any:
        """Timestep."""

    @property
    def alpha(self) -> Any:
        """Scale of the data."""

    @property
    def sigma(self) -> Any:
        """Scale of the noise."""


def to_x0(prediction: str, x: Array, out: Array, level: Level) -> Array:
    """Return x_0 for the network's output `out` at x.

    Raises:
        InvalidInputError: An epsilon prediction at one level of pure noise (alpha = 0), which does not determine x_0.
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction == "sample":
        return out
    if prediction == "v":
        return (alpha * x - sigma * out) / (alpha**2 + sigma**2)
    if prediction == "flow":
        return (x - sigma * out) / (alpha + sigma)
    if isinstance(alpha, float) and alpha == 0.0:
        raise InvalidInputError(
            f"timestep {level.t:g} is pure noise (alpha 0), where an epsilon prediction does not determine the "
            "image; start the plan at an earlier timestep"
        )
    return (x - sigma * out) / _divisor(alpha)


def to_epsilon(prediction: str, x: Array, out: Array, level: Level) -> Array:
    """Return eps for the network's output `out` at x."""
    if prediction == "epsilon":
        return out
    if prediction == "v":
        return level.alpha * out + level.sigma * x
    if prediction == "flow":
        return x + level.alpha * out
    return noise_in(x, out, level)


def to_output(prediction: str, x0: Array, eps: Array, level: Level) -> Array:
    """Return the network output that corresponds to x_0 and eps."""
    if prediction == "epsilon":
        return eps
    if prediction == "v":
        return level.alpha * eps - level.sigma * x0
    return eps - x0 if prediction == "flow" else x0


def noise_in(x: Array, x0: Array, level: Level) -> Array:
    """Return eps = (x - alpha x_0) / sigma."""
    return (x - level.alpha * x0) / _divisor(level.sigma)


def transfer(x: Array, x0: Array, now: Level, next: Level) -> Array:
    """Return alpha' x_0 + (sigma' / sigma)(x - alpha x_0), the deterministic step to the level `next`."""
    kept = _kept_noise(now, next)
    return (next.alpha - kept * now.alpha) * x0 + kept * x


def implied_x0(x: Array, moved: Array, now: Level, next: Level) -> Array:
    """Return the x_0 with which `transfer` leads from x to `moved`."""
    kept = _kept_noise(now, next)
    return (moved - kept * x) / (next.alpha - kept * now.alpha)


def _kept_noise(now: Level, next: Level) -> Any:
    """Return sigma' / sigma; a single sample without noise stays without noise."""
    return 0.0 if isinstance(now.sigma, float) and now.sigma == 0.0 else next.sigma / now.sigma


def _divisor(scale: Any) -> Any:
    return scale if isinstance(scale, float) else scale.clip(MIN_DIVISOR)
