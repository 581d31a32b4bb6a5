"""Activation and weight scales, gathered while the model samples by its own plan.

Weights take one amax per output channel, activations one per tensor, read from a histogram that is filled while the
model samples: what it will see when deployed, at every timestep it will visit, and memory for the histograms only.

With `reduce_range` a weight's amax is read as twice what it is, so that its integers stay within -64..64: processors
without VNNI add two products of a uint8 and an int8 in 16 bits, and 2 * 255 * 64 is the most that fits (onnxruntime's
and NNCF's documentation name the same remedy).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from compress.checkpoint import Checkpoint
from compress.config import QuantizeConfig
from compress.context import Context
from compress.progress import progress
from compress.torch_network import TorchNetwork
from runtime.errors import BadInput
from runtime.sampler import generate_batches
from runtime.solvers import network_calls

LEVELS, REDUCED_LEVELS = 127, 64
CALIBRATION_SEED = 1_000_000  # far from the seeds that people sample and evaluate with

Scales = dict[str, torch.Tensor]


def calibrate(model: nn.Module, checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> Scales:
    """'<layer>.<weight|input|output>' -> amax of every quantizer in `model`, the checkpoint's with quantizers in place.

    Raises BadInput, naming the layer, for a scale that is zero, infinite or missing.
    """
    _observe_(model, checkpoint, config, ctx)
    return _collect(model, config)


def _observe_(model: nn.Module, checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> None:
    from modelopt.torch.quantization.model_calib import enable_stats_collection

    enable_stats_collection(model)
    spec = checkpoint.spec
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + config.samples)
    calls = itertools.count(1)
    batches = -(-config.samples // config.batch)
    with progress("calibrate", batches * network_calls(spec.plan.solver, spec.plan.steps)) as advance:
        # guided or not, one call for both halves
        hook = model.register_forward_hook(lambda *_: advance(next(calls)))
        told = ctx.conditions(config.samples)
        for _ in generate_batches(TorchNetwork(model, spec), spec, seeds, batch=config.batch, conditions=told):
            pass
        hook.remove()


def _collect(model: nn.Module, config: QuantizeConfig) -> Scales:
    found: Scales = {}
    for name, module in model.named_modules():
        for what in ("weight", "input", "output"):
            quantizer = getattr(module, f"{what}_quantizer", None)
            if quantizer is None or not quantizer.is_enabled and not quantizer._if_calib:
                continue
            if what == "weight":
                # only where the engine multiplies integers can their products overflow
                reduced = config.reduce_range and module.input_quantizer.is_enabled
                value = module.weight.detach().flatten(1).abs().amax(1) * (LEVELS / REDUCED_LEVELS if reduced else 1.0)
            else:
                value = _activation_amax(quantizer._calibrator, config)
            if value is None or not torch.isfinite(value).all() or (value <= 0).any():
                raise BadInput(
                    f"quantize: layer '{name}' has a {what} scale that is zero, infinite or missing; "
                    f"keep it in float with keep: [{name}]"
                )
            found[f"{name}.{what}"] = value.float().cpu()
    return found


def _activation_amax(calibrator: Any, config: QuantizeConfig) -> torch.Tensor | None:
    if config.calibration == "max":
        edges = calibrator._calib_bin_edges
        return None if edges is None else torch.as_tensor(edges[-1])
    options = {"percentile": config.percentile} if config.calibration == "percentile" else {}
    value = calibrator.compute_amax(config.calibration, **options)
    return None if value is None else torch.as_tensor(value)
