"""Wrap a torch module as the runtime's `Network`: numpy arrays in, numpy array out.

The runtime's sampler then runs unchanged on torch and on an engine, so that a difference between two images comes from
the network alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from diffpress.compress.models.adapter import adapter_for, cut_of, dummy_inputs
from diffpress.compress.models.fast_path import without_fast_path
from diffpress.compress.models.feature_cuts import Cut, split_forward
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec


class TorchNetwork:
    """A torch denoiser as `diffpress.runtime.network_inputs.Network`, run in eval mode without gradients.

    Each run restores the previous mode, so that a model can be sampled during training. Weights in bfloat16 or float16
    are converted to float32 for the computation: the result is the reference for float32 engines. `fast_path` permits
    torch's fused attention (compress/models/fast_path.py), which bypasses quantizers and hooks. `cut` names where
    `run_full` splits the network; None for the cut of the spec's plan.
    """

    name = "torch"

    def __init__(self, model: nn.Module, spec: DenoiserSpec, fast_path: bool = False, cut: str | None = None) -> None:
        self._model, self._forward = model, adapter_for(model).forward
        self._attention = nullcontext if fast_path else without_fast_path
        # a custom module may have no parameters
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.inputs: Mapping[str, np.dtype] = {
            name: tensor.numpy().dtype for name, tensor in dummy_inputs(spec, 1).items()
        }

        cache = spec.plan.cache
        self._cut = cache.cut if cut is None and cache is not None else cut

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Evaluate the network on inputs by name; returns float32 [B, ...]."""
        return self._evaluate(inputs, lambda feed: (self._forward(self._model, feed),))[0]

    def run_full(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Evaluate the network; returns its output and its features (compress/models/feature_cuts.py)."""
        cut = self._split_at()
        out, *features = self._evaluate(inputs, lambda feed: split_forward(self._model, self._forward, cut, feed))
        return out, features

    def run_cached(self, inputs: dict[str, np.ndarray], features: list[np.ndarray]) -> np.ndarray:
        """Evaluate the network with features of an earlier evaluation; returns its output."""
        cut = self._split_at()
        held = [torch.from_numpy(array).to(self._device) for array in features]
        return self._evaluate(inputs, lambda feed: split_forward(self._model, self._forward, cut, feed, held))[0]

    def _split_at(self) -> Cut:
        """Return the cut; InvalidInputError if neither the plan nor the caller named one."""
        if self._cut is None:
            raise InvalidInputError("the network was opened for a plan without features; sample without the cache")
        return cut_of(self._model, self._cut)

    def _evaluate(
        self, inputs: dict[str, np.ndarray], evaluate: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]
    ) -> list[np.ndarray]:
        """Return the tensors of `evaluate` for inputs by name, float32."""
        feed = {name: torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for name, array in inputs.items()}
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), self._attention(), _in_float32(self._model):
                tensors = evaluate(feed)
        finally:
            self._model.train(training)
        return [tensor.float().cpu().numpy() for tensor in tensors]

    def close(self) -> None:
        """Do nothing; part of the engine interface."""


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Convert half-precision weights to float32 while their module runs, one module at a time."""
    half = [m for m in model.modules() if any(p is not None and _is_half(p) for p in m._parameters.values())]
    with ExitStack() as stack:
        for module in half:
            original = dict(module._parameters)
            if module is half[0]:  # UNet2DModel casts inputs to the dtype of its first weight, so that stays float32
                _to_float32_(module, ())
                stack.callback(module._parameters.update, original)
                continue
            convert = module.register_forward_pre_hook(_to_float32_)
            restore = module.register_forward_hook(
                lambda m, *_, original=original: m._parameters.update(original), always_call=True
            )
            stack.callback(convert.remove)
            stack.callback(restore.remove)
        yield


def _to_float32_(module: nn.Module, arguments: object) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and _is_half(parameter):
            module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)


def _is_half(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4
