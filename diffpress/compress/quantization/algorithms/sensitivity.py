"""Sensitivity: the noise in the output caused by quantizing one module while all others stay in float.

    noise(p) = sum |f_p(x) - f(x)|^2 / sum |f(x)|^2        over states x of the model's own trajectory
    SQNR     = -10 log10 noise

p is a module with scales: a layer with its weight, input and output, or a block whose residual sum is quantized. Errors
of different modules are nearly uncorrelated, so their powers add: noise(S) is about the sum of noise(p) over S. This is
accurate enough to order modules; the noise of a set is measured on the set.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.models.counts import is_large
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.progress import progress
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json, write_json

ROWS, ROWS_OF_LARGE = 64, 8
ROWS_TO_ORDER = 32  # of a single module, whose noise only gives its place in an order
FILE = "sensitivity.json"


class OutputNoise:
    """Noise of a quantized checkpoint's output on states of the float model's trajectories, for any set of modules."""

    def __init__(self, quantized: Checkpoint, dataset: TrajectoryDataset, seed: int) -> None:
        self.rows = ROWS_OF_LARGE if is_large(quantized.model) else ROWS
        states = dataset.draw(self.rows, torch.Generator().manual_seed(seed))
        self._inputs = {name: value.numpy() for name, value in states.inputs.items()}
        self._reference, self._batch = states.outputs.numpy(), dataset.batch
        model = fake_quantized(quantized)
        self._network, self._quantizers = TorchNetwork(model, quantized.spec), _quantizers(model)

    def of(self, modules: Collection[str], rows: int | None = None) -> float:
        """Return the noise with only `modules` quantized, on the first `rows` of the states."""
        for name, quantizers in self._quantizers.items():
            for quantizer in quantizers:
                quantizer.enable() if name in modules else quantizer.disable()
        errors = power = 0.0
        rows = self.rows if rows is None else min(rows, self.rows)
        for start in range(0, rows, self._batch):
            part = slice(start, min(start + self._batch, rows))
            out = self._network.run({name: value[part] for name, value in self._inputs.items()})
            errors += float(((out - self._reference[part]).astype(np.float64) ** 2).sum())
            power += float((self._reference[part].astype(np.float64) ** 2).sum())
        return errors / power


def quantized_layers(quantization: Quantization) -> list[str]:
    """Return the modules that have scales, in alphabetical order."""
    return sorted({key.rpartition(".")[0] for key in quantization.amax})


def noise_by_layer(quantized: Checkpoint, noise: OutputNoise, ctx: Context) -> dict[str, float]:
    """Return module -> noise for every quantized module of the checkpoint.

    Measurements of a killed run are read from the context's folder.

    Raises:
        InvalidInputError: The output is not finite; the message names the module.
    """
    assert quantized.quantization is not None
    names, file = quantized_layers(quantized.quantization), ctx.work / FILE
    stored = read_json(file) if file.is_file() else {}
    found: dict[str, float] = stored["noise"] if stored.get("checkpoint") == quantized.hash else {}
    with progress("sensitivity", len(names), len(found)) as advance:
        for name in names:
            if name in found:
                continue
            found[name] = noise.of({name}, ROWS_TO_ORDER)
            if not np.isfinite(found[name]):
                raise InvalidInputError(
                    f"quantize: the output is not finite with only '{name}' quantized; keep it in float with "
                    f"ignored_layers: [{name}]"
                )
            write_json(file, {"checkpoint": quantized.hash, "noise": found})
            advance(len(found), f"{name} {decibels(found[name]):.1f} dB")
    return found


def decibels(noise: float) -> float:
    """Return the SQNR of a relative noise power, in dB."""
    return float(-10.0 * np.log10(max(noise, 1e-20)))


def _quantizers(model: torch.nn.Module) -> dict[str, list[Any]]:
    """Return module -> its enabled quantizers."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            found.setdefault(name.rpartition(".")[0], []).append(module)
    return found
