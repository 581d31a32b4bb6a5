"""compress/quantization/unified_scales.py: residual sums are quantized, and concatenated tensors share one scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.layer_graph import trace_layer_graph
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.unified_scales import unify_scales
from tests.compress.quantization.scales import scales_of

# concatenations of the tiny U-Net: stream, skip, the layers that read both or one of them
CONCATS = [
    ("mid_block.resnets.1", "down_blocks.1.attentions.0", ["up_blocks.0.resnets.0.conv_shortcut"]),
    (
        "up_blocks.0.attentions.0",
        "down_blocks.0.downsamplers.0.conv",
        ["up_blocks.0.resnets.1.conv_shortcut", "down_blocks.1.resnets.0.conv_shortcut"],
    ),
    (
        "up_blocks.0.upsamplers.0.conv",
        "down_blocks.0.resnets.0",
        ["up_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv"],
    ),
    ("up_blocks.1.resnets.0", "conv_in", ["up_blocks.1.resnets.1.conv_shortcut"]),
]


def config(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"samples": 2, "batch": 2, **settings})


def numbered_scales(keys: Iterable[str]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(float(i)) for i, key in enumerate(keys, start=1)}


def test_concatenated_tensors_share_the_largest_scale_and_the_rest_keep_their_own(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    found = scales_of(quantize(unet, config(), context(unet))).amax
    own = numbered_scales(key for key in found if not key.endswith(".weight"))
    shared, unshared = unify_scales(trace_layer_graph(unet.model, unet.spec), own), set(own)
    for stream, skip, readers in CONCATS:
        keys = [f"{stream}.output", f"{skip}.output", *(f"{reader}.input" for reader in readers)]
        assert {shared[key].item() for key in keys} == {max(own[key].item() for key in keys)}
        assert len({found[key].item() for key in keys}) == 1
        unshared -= set(keys)
    upsampled = ["up_blocks.0.attentions.1.output", "up_blocks.0.upsamplers.0.conv.input"]
    assert shared[upsampled[0]] == shared[upsampled[1]] == max(own[key] for key in upsampled)
    unshared -= set(upsampled)
    # to_q, to_k and to_v read the same tensor
    heads = [key for key in unshared if key.endswith(("to_q.input", "to_k.input", "to_v.input"))]
    assert len(heads) == 12 and {key: shared[key] for key in unshared} == {key: own[key] for key in unshared}


def test_every_residual_sum_of_a_unet_is_quantized(unet: Checkpoint, context: Callable[..., Context]) -> None:
    quantized = quantize(unet, config(), context(unet))
    model = fake_quantized(quantized)
    seen: dict[str, torch.Tensor] = {}
    names = adapter_for(unet.model).residual_outputs(unet.model)
    assert len(names) == 13 and "conv_in" in names and "mid_block.attentions.0" in names
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        adapter_for(model).forward(model, dummy_inputs(unet.spec, 2))
    for name in names:
        levels = seen[name] / (scales_of(quantized).amax[f"{name}.output"] / 127)
        assert levels.abs().max() > 20
        torch.testing.assert_close(levels, levels.round().clamp(-128, 127), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"ignored_layers": ("down_blocks.0",)},
        {"format_overrides": {"down_blocks.0": "int8_weight_only"}},
        {"format_overrides": {"down_blocks.0": "float"}},
    ],
)
def test_overridden_blocks_have_no_quantized_outputs_and_unify_no_scales(
    settings: dict[str, Any], unet: Checkpoint, context: Callable[..., Context]
) -> None:
    amax = scales_of(quantize(unet, config(**settings), context(unet))).amax
    assert not any(key.startswith("down_blocks.0") and key.endswith((".input", ".output")) for key in amax)
    own = numbered_scales(key for key in amax if not key.endswith(".weight"))
    changed = {
        key for key, value in unify_scales(trace_layer_graph(unet.model, unet.spec), own).items() if value != own[key]
    }
    joined = [f"{stream}.output" for stream, _, _ in CONCATS]
    assert not changed & {joined[1], joined[2]} and changed & {joined[0], "down_blocks.1.attentions.0.output"}


@pytest.mark.parametrize("settings", [{"outputs": False}, {"layers": ("linear",)}, {"format": "fp8"}])
def test_without_integer_convolutions_residual_sums_are_not_quantized(
    settings: dict[str, Any], unet: Checkpoint, context: Callable[..., Context]
) -> None:
    amax = scales_of(quantize(unet, config(**settings), context(unet))).amax
    assert not any(f"{name}.output" in amax for name in adapter_for(unet.model).residual_outputs(unet.model))


class Combined(nn.Module):
    """Combines the outputs of a and b with the function under test."""

    def __init__(self, combine: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(1, 1, 1) for _ in range(3))
        self._combine = combine

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.c(self._combine(self.a(sample), self.b(sample))[:, :1])


@pytest.mark.parametrize(
    ("combine", "unified"),
    [
        (lambda a, b: torch.cat([a, b], 1), "ab"),
        (lambda a, b: torch.cat(tensors=(F.pad(a, (0, 1)), F.pad(b, (0, 1), "constant", 0.0)), dim=1), "ab"),
        (lambda a, b: torch.concat((F.interpolate(a, scale_factor=2), F.interpolate(b, None, 2.0, "nearest"))), "ab"),
        (lambda a, b: torch.cat([F.pad(a, (1, 1, 0, 0), "reflect"), F.pad(b, (1, 1, 0, 0))], 1), ""),
        (lambda a, b: torch.cat([F.pad(a, (1, 1)), F.pad(b, (1, 1), value=0.5)], 1), ""),
        (lambda a, b: torch.cat([F.interpolate(a, None, 2, "bilinear"), F.interpolate(b, None, 2)]), ""),
        (lambda a, b: torch.cat([a, b + 1], 1), ""),
        (lambda a, b: a + b, ""),
    ],
)
def test_only_operations_that_copy_values_unify_scales(
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], unified: str, custom: Callable[..., Checkpoint]
) -> None:
    checkpoint = custom(Combined(combine))
    graph = trace_layer_graph(checkpoint.model, checkpoint.spec)
    own = numbered_scales(f"{name}.output" for name in "abc")
    shared = unify_scales(graph, own)
    assert shared == ({**own, "a.output": own["b.output"]} if unified else own)


def test_a_layer_that_reads_a_quantized_output_unchanged_shares_its_scale(custom: Callable[..., Checkpoint]) -> None:
    class Read(Combined):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(sample)) + 0)

    checkpoint = custom(Read(None))
    own = numbered_scales(["a.output", "b.input", "b.output", "c.input"])
    assert unify_scales(trace_layer_graph(checkpoint.model, checkpoint.spec), own) == {
        **own,
        "a.output": own["b.input"],
    }
