"""Fake quantization with nvidia-modelopt's quantizers: the reference in torch for the quantized engine.

    integers    q(x) = clip(round(x / s), -m, m) * s,     s = amax / m,      m = 127 or 7 (activations: from -128)
    floats      q(x) = E4M3(clip(x / s, -448, 448)) * s,  s = amax / 448,    rounded to the nearest, ties to even

4-bit floats are in nvfp4.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization, shared_copy
from diffpress.compress.quantization.algorithms.smoothquant import along
from diffpress.compress.quantization.algorithms.svdquant import attach_svdquant_
from diffpress.compress.quantization.calibration.weight_scales import broadcast_amax
from diffpress.compress.quantization.formats import FORMATS, FP4, FP8, INT8, Format, scale_shape
from diffpress.compress.quantization.layer_kinds import torch_class
from diffpress.compress.quantization.nvfp4 import BACKEND, BLOCK, fake_nvfp4
from diffpress.runtime.errors import InvalidInputError


def fake_quantized(checkpoint: Checkpoint) -> nn.Module:
    """Return the checkpoint's model with modelopt's quantizers inserted, in eval mode.

    A checkpoint without quantization returns its own model.

    Raises:
        InvalidInputError: The scales do not fit the model.
    """
    if checkpoint.quantization is None:
        return checkpoint.model
    return fake_quantized_module(checkpoint.model, checkpoint.quantization)


def fake_quantized_module(module: nn.Module, quantization: Quantization) -> nn.Module:
    """Return a copy of a module that shares its tensors, with modelopt's quantizers inserted, in eval mode.

    Raises:
        InvalidInputError: The scales do not fit the module.
    """
    amax, formats = quantization.amax, quantization.layer_formats
    model = shared_copy(module)
    _check_scales_fit(dict(model.named_modules()), amax, formats)
    outputs = [key.removesuffix(".output") for key in amax if key.endswith(".output")]
    model = insert_quantizers(model, formats, outputs)
    modules = dict(model.named_modules())
    for key, value in amax.items():
        layer, what = key.rsplit(".", 1)
        quantizer: Any = getattr(modules[layer], f"{what}_quantizer")
        quantizer.amax = quantizer_amax(value, modules[layer]) if what == "weight" else value
    for layer, vector in quantization.smooth.items():
        factor = along(vector, modules[layer])
        modules[layer].weight_quantizer.pre_quant_scale = factor
        modules[layer].input_quantizer.pre_quant_scale = 1 / factor
    if quantization.svdquant:
        attach_svdquant_(model, quantization)
    return model.eval()


def _check_scales_fit(modules: dict[str, nn.Module], amax: dict[str, torch.Tensor], formats: dict[str, str]) -> None:
    for key, value in amax.items():
        layer, what = key.rsplit(".", 1)
        weight = getattr(modules.get(layer), "weight", None)
        fits = (weight is not None and layer in formats) or (what == "output" and layer in modules)
        if what == "weight" and weight is not None and fits:
            fits = tuple(value.shape) == scale_shape(FORMATS[formats[layer]], weight.shape)
        if not fits or (what != "weight" and value.numel() != 1):
            raise InvalidInputError(
                f"scale '{key}' with {value.numel()} values does not fit this model; quantize it again"
            )


def insert_quantizers(model: nn.Module, formats: Mapping[str, str], outputs: Iterable[str]) -> Any:
    """Insert quantizers in place: into every layer of `formats`, and after each module of `outputs`."""
    output_modules = set(outputs)
    for name, kind in formats.items():
        _quantize_layer_(model.get_submodule(name), FORMATS[kind], name in output_modules)
    for name in output_modules - set(formats):
        _quantize_output_(model.get_submodule(name))
    return model


def quantizers_that_ran(model: nn.Module, evaluate: Callable[[], object]) -> set[str]:
    """Return the keys of the amaxes whose fake quantizers run while `evaluate` runs the fake-quantized model."""
    ran: set[str] = set()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            layer, _, quantizer = name.rpartition(".")
            key = f"{layer}.{quantizer.removesuffix('_quantizer')}"
            if getattr(module, "is_enabled", False):  # of TensorQuantizer
                stack.callback(module.register_forward_hook(lambda *_, key=key: ran.add(key)).remove)
        evaluate()
    return ran


def _quantize_layer_(layer: Any, form: Format, with_output: bool) -> None:
    """Convert a layer in place to modelopt's quantized layer, with quantizers of `form`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modelopt warns about optional plugins
        from modelopt.torch.quantization.config import QuantizerAttributeConfig
        from modelopt.torch.quantization.nn import QuantModuleRegistry

        # modelopt names its class after the layer's, and refuses a second class of the same name
        layer.__class__ = torch_class(layer)
        QuantModuleRegistry.convert(layer)
    settings = {"weight": _weight_settings(form, layer)}
    if form.activations:
        settings["input"] = _activation_settings(form)
    if with_output:
        settings["output"] = _activation_settings(form)
    for side in ("weight", "input", "output"):
        attributes = settings.get(side, {"enable": False})
        getattr(layer, f"{side}_quantizer").set_from_attribute_config(QuantizerAttributeConfig(**attributes))


def _quantize_output_(module: nn.Module) -> None:
    """Add an int8 output quantizer to a module that is not a quantized layer; of a tuple, it quantizes the first."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    module.output_quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=8, axis=None))
    module.register_forward_hook(_quantized_output)


def _quantized_output(module: Any, _: Any, out: Any) -> Any:
    return (module.output_quantizer(out[0]), *out[1:]) if isinstance(out, tuple) else module.output_quantizer(out)


def _activation_settings(form: Format) -> dict[str, Any]:
    if form.activations is FP4:
        return _nvfp4_settings()
    return {"num_bits": (form.activations or INT8).bits, "axis": None}


def _nvfp4_settings() -> dict[str, Any]:
    from modelopt.torch.quantization.nn import is_registered_quant_backend, register_quant_backend

    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, fake_nvfp4)
    blocks = {-1: BLOCK, "type": "dynamic", "scale_bits": FP8.bits}
    return {"num_bits": FP4.bits, "block_sizes": blocks, "backend": BACKEND}


def _weight_settings(form: Format, layer: Any) -> dict[str, Any]:
    if form.weights is FP4:
        return _nvfp4_settings()
    # narrow range: -128 and -8 are never stored, so that w and -w round symmetrically
    settings: dict[str, Any] = {"num_bits": form.weights.bits, "narrow_range": form.weights.is_integer}
    shape = scale_shape(form, layer.weight.shape)
    if len(shape) == 1:
        return settings | {"axis": 0}
    if layer.weight.dim() == 2:
        return settings | {"block_sizes": {-1: layer.weight.shape[1] // shape[1]}}
    return settings | {"axis": None}  # modelopt has no blocks over a kernel: use one amax per weight


def quantizer_amax(amax: torch.Tensor, layer: Any) -> torch.Tensor:
    """Reshape a weight's `amax` [out] or [out, blocks] to what modelopt's quantizer of `layer` expects."""
    blocks_of_matrix = amax.dim() == 2 == layer.weight.dim()
    return amax.reshape(-1, 1) if blocks_of_matrix else broadcast_amax(amax, layer.weight)
