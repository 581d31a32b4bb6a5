"""A denoiser's graph and its cached graph, open in the same engine: features pass between them without a copy.

An engine that supports it has one more method,

    run_keeping(inputs, kept=(), held={}) -> (first output, outputs `kept` in the engine's own form)

where `held` are inputs in that form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffpress.runtime.errors import InvalidInputError


class SplitEngine:
    """An engine with the cached graph of its network; see diffpress.runtime.caching.features.SplitNetwork.

    Args:
        full: The engine of the whole network.
        cached: The engine of the cached graph.
        features: Names of the features: outputs of the first and inputs of the second.

    Raises:
        InvalidInputError: The graphs do not belong together.
    """

    def __init__(self, full: Any, cached: Any, features: tuple[str, ...]) -> None:
        self._full, self.cached, self._features = full, cached, features
        self.inputs: Mapping[str, np.dtype] = full.inputs
        # the slots of the outer layers are inputs of both graphs, which read the same arrays
        self.lora: Mapping[str, np.ndarray] = getattr(full, "lora", {})
        if self.lora:
            cached.lora.update({name: self.lora[name] for name in cached.lora})
        taken = set(cached.inputs) - set(full.inputs)
        if not features or taken != set(features) or not set(features) <= set(full.outputs):
            raise InvalidInputError(
                f"the cached graph takes {', '.join(sorted(taken)) or 'no features'}, the whole graph returns "
                f"{', '.join(full.outputs[1:]) or 'none'}: they do not match; export the bundle again"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._full, name)

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the output of the whole network for one batch."""
        out: np.ndarray = self._full.run(inputs)
        return out

    def run_full(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, Any]:
        """Return the output of the whole network, and the features as the engine keeps them."""
        found: tuple[np.ndarray, Any] = self._full.run_keeping(inputs, self._features)
        return found

    def run_cached(self, inputs: dict[str, np.ndarray], features: Any) -> np.ndarray:
        """Return the output of the outer layers for the features of a full evaluation."""
        taken = {name: array for name, array in inputs.items() if name in self.cached.inputs}
        out: np.ndarray = self.cached.run_keeping(taken, held=features)[0]
        return out

    def close(self) -> None:
        """Release both graphs."""
        self._full.close()
        self.cached.close()
