"""A torch module seen as the runtime's `Network`: numpy arrays in, numpy array out.

The samplers of `runtime` then walk the very same trajectory through torch as through an engine, so a difference
between two images comes from the network alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.runtime.spec import DenoiserSpec


class TorchNetwork:
    """`model` (any module an adapter knows) as diffpress.runtime.network_inputs.Network; it runs in eval mode, without gradients.

    Every call restores the mode it found, so a model in training may be sampled in between. A model that is held in
    bfloat16 or float16 computes in float32 all the same: it is the reference for engines that do.
    """

    name = "torch"

    def __init__(self, model: nn.Module, spec: DenoiserSpec) -> None:
        self._model, self._forward = model, adapter_for(model).forward
        # without parameters: a custom module may have none
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.inputs: Mapping[str, np.dtype] = {
            name: tensor.numpy().dtype for name, tensor in dummy_inputs(spec, 1).items()
        }

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The network's output, float32 [B, C, H, W], for inputs of the names and types in `inputs`."""
        feed = {name: torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for name, array in inputs.items()}
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), _in_float32(self._model):
                out = self._forward(self._model, feed)
        finally:
            self._model.train(training)
        result: np.ndarray = out.float().cpu().numpy()
        return result

    def close(self) -> None:
        """Nothing to release; here so that it can stand where an engine does."""


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, every module's own half-precision weights are float32 while it runs: one layer's at a time."""
    narrow = [m for m in model.modules() if any(p is not None and _is_narrow(p) for p in m._parameters.values())]
    with ExitStack() as stack:
        for module in narrow:
            kept = dict(module._parameters)
            if module is narrow[0]:  # UNet2DModel casts to the type of the model's first weight: wide all the while
                _widen_(module, ())
                stack.callback(module._parameters.update, kept)
                continue
            wide = module.register_forward_pre_hook(_widen_)
            back = module.register_forward_hook(lambda m, *_, kept=kept: m._parameters.update(kept), always_call=True)
            stack.callback(wide.remove)
            stack.callback(back.remove)
        yield


def _widen_(module: nn.Module, arguments: object) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and _is_narrow(parameter):
            module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)


def _is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4
