"""Quantization through nvidia-modelopt's quantizers, calibrated on the model's own trajectory.

    q(x) = clip(round(x / s), -127, 127) * s,    s = amax / 127

With `reduce_range` a weight's amax is read as twice what it is, so that its integers stay within -64..64: processors
without VNNI add two products of a uint8 and an int8 in 16 bits, and 2 * 255 * 64 is the most that fits (onnxruntime's
and NNCF's documentation name the same remedy). A convolution's output is quantized too: ONNX Runtime only runs it on
integers where integers also leave it.

Weights take one amax per output channel, activations one per tensor, read from a histogram that is filled while the
model samples by its own plan: what it will see when deployed, at every timestep it will visit, and memory for the
histograms only. Fragile layers keep float arithmetic; of these the linear ones (time and class embedding) store
their weights as int8 all the same, since they weigh much in the file and little in time.

The result is data, not a patched module: the checkpoint keeps its float weights beside the amax of every quantizer,
and `fake_quantized` puts the quantizers back wherever the quantized model has to be run in torch.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from typing import Any

import torch
from torch import nn

from compress.adapters import adapter_for
from compress.checkpoint import Checkpoint, Quantization
from compress.config import QuantizeConfig
from compress.context import Context, say
from compress.progress import progress
from compress.qat import qat
from compress.torch_network import TorchNetwork
from runtime.errors import BadInput
from runtime.sampler import generate_batches
from runtime.solvers import network_calls

KINDS: dict[str, type[nn.Module]] = {"conv": nn.Conv2d, "linear": nn.Linear}
LEVELS, REDUCED_LEVELS = 127, 64
CALIBRATION_SEED = 1_000_000  # far from the seeds that people sample and evaluate with


def quantize(checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> Checkpoint:
    """Calibrate; returns the same float model with the scales of every quantized layer. Mode qat then trains it."""
    full, weight_only = choose_layers(checkpoint.model, config)
    modules = dict(checkpoint.model.named_modules())
    outputs = [name for name in full if isinstance(modules[name], nn.Conv2d)] if config.outputs else []
    model = _with_quantizers(checkpoint.shared_model(), full, weight_only, outputs)
    _calibrate_(model, checkpoint, config, ctx)
    amax = _collect(model, config)
    say(f"{len(full)} layers in {config.format}, {len(weight_only)} with {config.format} weights only")
    scales = Quantization(config.format, amax)
    if config.mode == "ptq":
        return checkpoint.evolve(quantization=scales)
    student = fake_quantized(checkpoint.evolve(model=checkpoint.clone_model().float(), quantization=scales))
    return qat(checkpoint, scales, student, config, ctx)


def fake_quantized(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's model with modelopt's quantizers in place, in eval mode: what the int8 engine should compute."""
    if checkpoint.quantization is None:
        return checkpoint.model
    amax, layers = checkpoint.quantization.amax, checkpoint.quantization.layers
    full = [name for name in layers if f"{name}.input" in amax]
    weight_only = [name for name in layers if f"{name}.input" not in amax]
    outputs = [name for name in layers if f"{name}.output" in amax]
    model = checkpoint.shared_model()
    _refuse_foreign(dict(model.named_modules()), amax)
    model = _with_quantizers(model, full, weight_only, outputs)
    modules = dict(model.named_modules())
    for key, value in amax.items():
        layer, what = key.rsplit(".", 1)
        quantizer: Any = getattr(modules[layer], f"{what}_quantizer")
        quantizer.amax = _broadcast(value, modules[layer]) if what == "weight" else value
    return model.eval()


def _refuse_foreign(modules: dict[str, nn.Module], amax: dict[str, torch.Tensor]) -> None:
    for key, value in amax.items():
        layer, what = key.rsplit(".", 1)
        weight = getattr(modules.get(layer), "weight", None)
        if weight is None or value.numel() != (weight.shape[0] if what == "weight" else 1):
            raise BadInput(f"scale '{key}' with {value.numel()} values does not fit this model; quantize it again")


def choose_layers(model: nn.Module, config: QuantizeConfig) -> tuple[list[str], list[str]]:
    """Names of the layers quantized in weights and activations, and of those quantized in weights only."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, tuple(KINDS.values()))}
    unknown = [name for name in config.keep if not any(layer.startswith(name) for layer in layers)]
    if unknown:
        raise BadInput(f"quantize: keep names '{unknown[0]}', and no layer of the model begins so")
    open_to_it = [name for name in layers if not any(name.startswith(prefix) for prefix in config.keep)]
    fragile = set(adapter_for(model).fragile(model))
    kinds = tuple(KINDS[kind] for kind in config.layers)
    full = [name for name in open_to_it if name not in fragile and isinstance(layers[name], kinds)]
    weight_only = [name for name in open_to_it if name not in full and isinstance(layers[name], nn.Linear)]
    return full, weight_only


def _with_quantizers(model: nn.Module, full: list[str], weight_only: list[str], outputs: list[str]) -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # modelopt warns about optional plugins, and prints how many it inserted
        import modelopt.torch.quantization as mtq
        from modelopt.torch.opt.dynamic import DynamicModule

        rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        for name in [*full, *weight_only]:
            rules.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}})
        for name in [*(f"{layer}.input" for layer in full), *(f"{layer}.output" for layer in outputs)]:
            cfg = {"num_bits": 8, "axis": None, "calibrator": "histogram"}
            rules.append({"quantizer_name": f"{name}_quantizer", "cfg": cfg})
        quantized = mtq.quantize(model, {"quant_cfg": rules, "algorithm": None})
    scaled = {*full, *weight_only}
    for name, module in list(quantized.named_modules()):
        # what has no scales becomes again what it was: modelopt's attention, for one, knows no gradient
        if isinstance(module, DynamicModule) and name not in scaled:
            module.export()
    return quantized


def _calibrate_(model: nn.Module, checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> None:
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


def _collect(model: nn.Module, config: QuantizeConfig) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
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


def _broadcast(amax: torch.Tensor, layer: Any) -> torch.Tensor:
    return amax.reshape(-1, *[1] * (layer.weight.dim() - 1))
