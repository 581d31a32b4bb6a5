"""Quantizers put into a model, from nvidia-modelopt: what the quantized engine should compute, in torch.

q(x) = clip(round(x / s), -127, 127) * s,    s = amax / 127
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compress.checkpoint import Checkpoint
from compress.quantization.formats import FORMATS
from runtime.errors import BadInput

KINDS = ("weight", "input", "output")


def fake_quantized(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's model with modelopt's quantizers in place, in eval mode: what the int8 engine should compute."""
    if checkpoint.quantization is None:
        return checkpoint.model
    quantization = checkpoint.quantization
    amax, formats = quantization.amax, {name: quantization.format_of(name) for name in quantization.layers}
    model = checkpoint.shared_model()
    _refuse_foreign(dict(model.named_modules()), amax)
    model = with_quantizers(model, formats, [name for name in formats if f"{name}.output" in amax])
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


def with_quantizers(model: nn.Module, formats: Mapping[str, str], outputs: Iterable[str]) -> Any:
    """`model` changed in place: every layer of `formats` with quantizers, those of `outputs` behind the layer too."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # modelopt warns about optional plugins, and prints how many it inserted
        import modelopt.torch.quantization as mtq
        from modelopt.torch.opt.dynamic import DynamicModule

        rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        for name, kind in formats.items():
            form = FORMATS[kind]
            rules.append(_rule(f"{name}.weight", {"num_bits": form.weights.bits, "axis": 0}))
            rounded = [f"{name}.input"] if form.activations else []
            rounded += [f"{name}.output"] if name in set(outputs) else []
            for key in rounded:
                assert form.activations is not None
                rules.append(_rule(key, {"num_bits": form.activations.bits, "axis": None, "calibrator": "histogram"}))
        quantized = mtq.quantize(model, {"quant_cfg": rules, "algorithm": None})
    for name, module in list(quantized.named_modules()):
        # what has no scales becomes again what it was: modelopt's attention, for one, knows no gradient
        if isinstance(module, DynamicModule) and name not in formats:
            module.export()
    return quantized


def _rule(key: str, cfg: dict[str, Any]) -> dict[str, Any]:
    return {"quantizer_name": f"{key}_quantizer", "cfg": cfg}


def _broadcast(amax: torch.Tensor, layer: Any) -> torch.Tensor:
    return amax.reshape(-1, *[1] * (layer.weight.dim() - 1))
