"""Sensitivity: the noise in the output caused by quantizing one module while all others stay in float.

    noise(p) = sum |f_p(x) - f(x)|^2 / sum |f(x)|^2        over states x of the model's own trajectory
    SQNR     = -10 log10 noise

p is a module with scales: a layer with its weight, input and output, or a block whose residual sum is quantized. Errors
of different modules are nearly uncorrelated, so their powers add: noise(S) is about the sum of noise(p) over S. This is
accurate enough to order modules; the noise of a set is measured on the set.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.models.counts import is_large
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.progress import progress
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.trajectory_dataset import draw_rows, sample_trajectories
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json, write_json

ROWS, ROWS_OF_LARGE = 64, 8
FILE = "sensitivity.json"


class States:
    """States that the float model visits, with its outputs there."""

    def __init__(self, checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> None:
        rows = ROWS_OF_LARGE if is_large(checkpoint.model) else ROWS
        dataset = sample_trajectories(checkpoint.model, checkpoint, min(rows, config.samples), config.batch, ctx)
        rows_by_name = draw_rows(dataset, rows, torch.Generator().manual_seed(ctx.seed))
        parts = [slice(start, start + config.batch) for start in range(0, rows, config.batch)]
        self._spec = checkpoint.spec
        self._inputs = [{name: value[part].numpy() for name, value in rows_by_name.items()} for part in parts]
        self._reference = self._outputs(checkpoint.model)

    def noise(self, model: nn.Module) -> float:
        """Return the power of the difference between this model's outputs and the float model's, relative to theirs."""
        pairs = list(zip(self._reference, self._outputs(model), strict=True))
        errors = sum(float(((found - reference).astype(np.float64) ** 2).sum()) for reference, found in pairs)
        return errors / sum(float((reference.astype(np.float64) ** 2).sum()) for reference, _ in pairs)

    def _outputs(self, model: nn.Module) -> list[np.ndarray]:
        network = TorchNetwork(model, self._spec)
        return [network.run(inputs) for inputs in self._inputs]


def quantized_layers(quantization: Quantization) -> list[str]:
    """Return the modules that have scales, in alphabetical order."""
    return sorted({key.rpartition(".")[0] for key in quantization.amax})


def noise_by_layer(checkpoint: Checkpoint, states: States, ctx: Context) -> dict[str, float]:
    """Return module -> noise for every quantized module of the checkpoint, with one pass over the states each.

    Measurements of a killed run are read from the context's folder.

    Raises:
        InvalidInputError: The output is not finite; the message names the module.
    """
    assert checkpoint.quantization is not None
    names, file = quantized_layers(checkpoint.quantization), ctx.work / FILE
    stored = read_json(file) if file.is_file() else {}
    found: dict[str, float] = stored["noise"] if stored.get("checkpoint") == checkpoint.hash else {}
    model = fake_quantized(checkpoint)
    quantizers = _quantizers(model)
    for quantizer in itertools.chain(*quantizers.values()):
        quantizer.disable()
    with progress("sensitivity", len(names), len(found)) as advance:
        for name in names:
            if name in found:
                continue
            for quantizer in quantizers[name]:
                quantizer.enable()
            noise = states.noise(model)
            for quantizer in quantizers[name]:
                quantizer.disable()
            if not np.isfinite(noise):
                raise InvalidInputError(
                    f"quantize: the output is not finite with only '{name}' quantized; keep it in float with "
                    f"ignored_layers: [{name}]"
                )
            found[name] = noise
            write_json(file, {"checkpoint": checkpoint.hash, "noise": found})
            advance(len(found), f"{name} {decibels(noise):.1f} dB")
    return found


def decibels(noise: float) -> float:
    """Return the SQNR of a relative noise power, in dB."""
    return float(-10.0 * np.log10(max(noise, 1e-20)))


def _quantizers(model: nn.Module) -> dict[str, list[Any]]:
    """Return module -> its enabled quantizers."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            found.setdefault(name.rpartition(".")[0], []).append(module)
    return found
