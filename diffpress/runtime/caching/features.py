"""Features that cached steps reuse: the inner layers of a network run in full steps only.

    full     sample, timestep, ... -> output, features        denoiser.onnx
    cached   sample, timestep, ..., features -> output        denoiser.cached.onnx: the outer layers alone

U-Nets reuse the input of an up block (DeepCache, Ma et al. 2024), transformers the residual of their middle blocks
(Delta-DiT, Chen et al. 2024). Under guidance the features have both halves. They stay where the engine computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from diffpress.runtime.caching.step_cache import FULL, StepCache
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel

if TYPE_CHECKING:
    from diffpress.runtime.denoiser import Predict

FEATURE = "feature."  # prefix of the features' names in both graphs


class SplitNetwork(Protocol):
    """A network that also evaluates its outer layers alone."""

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """Names and dtypes of the network's inputs."""

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the output of the whole network for one batch."""

    def run_full(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, Any]:
        """Return the output of the whole network, and the features in the engine's own form."""

    def run_cached(self, inputs: dict[str, np.ndarray], features: Any) -> np.ndarray:
        """Return the output of the outer layers for the features of a full evaluation with as many rows."""


class FeatureReuse:
    """A network whose evaluations are full or cached, as `step` says; it keeps the `features` of the last full one."""

    def __init__(self, network: SplitNetwork) -> None:
        self._network, self.inputs = network, network.inputs
        self.step = FULL
        self.features: Any = None

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the output for one batch."""
        if self.step != FULL:
            return self._network.run_cached(inputs, self.features)
        out, self.features = self._network.run_full(inputs)
        return out


class Reusing:
    """Predictor (x, level) -> output that evaluates the outer layers alone in cached steps.

    Attributes:
        cache: The step cache that it follows.
    """

    def __init__(self, reuse: FeatureReuse, predict: Predict, cache: StepCache, levels: Sequence[NoiseLevel]) -> None:
        self.cache, self._reuse, self._predict = cache, reuse, predict
        self._steps = dict(zip(levels, cache.steps, strict=True))

    def __call__(self, x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        """Return the output [N, ...] at one of the plan's levels."""
        self._reuse.step = self._steps[level]
        return self._predict(x, level)


def check_split(network: Any) -> None:
    """Raise InvalidInputError if a network cannot evaluate its outer layers alone."""
    if not (hasattr(network, "run_full") and hasattr(network, "run_cached")):
        raise InvalidInputError(
            "plan: cache: this network has no cached graph, which steps of kind 'features' evaluate; export the bundle "
            "again, or sample without the step cache (--no-step-cache)"
        )
