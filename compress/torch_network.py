"""A torch module seen as the runtime's `Network`: numpy arrays in, numpy array out.

The samplers of `runtime` then walk the very same trajectory through torch as through an engine, so a difference
between two images comes from the network alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from compress.adapters import adapter_for, example_inputs
from runtime.spec import DenoiserSpec


class TorchNetwork:
    """`model` (any module an adapter knows) as runtime.denoise.Network; it runs in eval mode, without gradients.

    Every call restores the mode it found, so a model in training may be sampled in between.
    """

    name = "torch"

    def __init__(self, model: nn.Module, spec: DenoiserSpec) -> None:
        self._model, self._forward = model, adapter_for(model).forward
        # without parameters: a custom module may have none
        first = next(model.parameters(), torch.empty(0))
        self._device, self._dtype = first.device, first.dtype
        self.inputs: Mapping[str, np.dtype] = {
            name: tensor.numpy().dtype for name, tensor in example_inputs(spec, 1).items()
        }

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The network's output, float32 [B, C, H, W], for inputs of the names and types in `inputs`."""
        feed = {name: self._tensor(array) for name, array in inputs.items()}
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                out = self._forward(self._model, feed)
        finally:
            self._model.train(training)
        result: np.ndarray = out.float().cpu().numpy()
        return result

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def close(self) -> None:
        """Nothing to release; here so that it can stand where an engine does."""
