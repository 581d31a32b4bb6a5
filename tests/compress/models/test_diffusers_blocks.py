"""compress/models/diffusers_blocks.py: pruning the blocks of every family.

Oracle: the unpruned network with the removed channels and heads silenced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Source
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.diffusers_blocks import attentions, coupled
from diffpress.compress.models.widths import apply_widths_, changed_widths, widths_of
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.runtime.conditioning import Conditioning, TextInput
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,  # diffusers interprets it as the number of heads
    "norm_num_groups": 8,
}
SDXL: dict[str, Any] = {
    **UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (4, 8),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
TRANSFORMER: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
PIXART = {**TRANSFORMER, "cross_attention_dim": 32, "caption_channels": 24, "use_additional_conditions": False}
JOINT: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
}
SD3 = {**JOINT, "sample_size": 8, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 32}
SD3 |= {"pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
FLUX = {**JOINT, "in_channels": 16, "num_single_layers": 2, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4)}

TEXT_32 = {"encoder_hidden_states": TextInput((6, 32), (("text_encoder.last_hidden_state",),))}
TEXT_24 = {"encoder_hidden_states": TextInput((6, 24), (("text_encoder.last_hidden_state",),))}
POOLED = {"pooled_projections": TextInput((16,), (("text_encoder.pooler_output",),))}
ADDED = {"text_embeds": TextInput((16,), (("text_encoder.text_embeds",),)), "time_ids": TextInput((6,), (("size",),))}
MASK = {"encoder_attention_mask": TextInput((6,), (("text_encoder.attention_mask",),))}

FAMILIES: dict[str, tuple[Any, dict[str, Any], Conditioning]] = {
    "sd": (UNet2DConditionModel, UNET, Conditioning("text", inputs=TEXT_32)),
    "scale_shift": (
        UNet2DConditionModel,
        {**UNET, "resnet_time_scale_shift": "scale_shift"},
        Conditioning("text", inputs=TEXT_32),
    ),
    "sdxl": (UNet2DConditionModel, SDXL, Conditioning("text", inputs=TEXT_32 | ADDED)),
    "dit": (DiTTransformer2DModel, {**TRANSFORMER, "num_embeds_ada_norm": 3}, Conditioning("class", 3, 3)),
    "pixart": (PixArtTransformer2DModel, PIXART, Conditioning("text", inputs=TEXT_24 | MASK)),
    "sd3": (SD3Transformer2DModel, SD3, Conditioning("text", inputs=TEXT_24 | POOLED)),
    "flux": (FluxTransformer2DModel, FLUX, Conditioning("text", inputs=TEXT_24 | POOLED, guidance_input=True)),
}
family = pytest.mark.parametrize("name", FAMILIES)
choices = pytest.mark.parametrize(("method", "scope"), [("magnitude", "local"), ("random", "global")])


def make_checkpoint(name: str) -> Checkpoint:
    kind, config, conditioning = FAMILIES[name]
    torch.manual_seed(0)
    model = kind(**config).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm) and layer.bias is not None:
                layer.bias.normal_(std=0.3)  # so that no removed channel writes only zeros
    schedule = betas_schedule("linear", 100)
    spec = DenoiserSpec("epsilon", schedule, (4, 8, 8), make_plan("ddim", 4, schedule), conditioning)
    return Checkpoint(model, spec, Source(kind.__name__, config, original=widths_of(model)))


@pytest.fixture(scope="module")
def families() -> dict[str, Checkpoint]:
    return {name: make_checkpoint(name) for name in FAMILIES}


def settings(method: str = "magnitude", scope: str = "local", ratio: float = 0.25, **more: Any) -> PruneConfig:
    return PruneConfig(**{"method": method, "scope": scope, "ratio": ratio, "round_to": 8, "timesteps": 1, **more})


def output_of(checkpoint: Checkpoint, model: nn.Module | None = None) -> torch.Tensor:
    model = checkpoint.model if model is None else model
    with torch.no_grad():
        return adapter_for(model).forward(model, dummy_inputs(checkpoint.spec, 2, seed=5))


# --- the oracle: the unpruned network with the removed channels silenced ----------------------------------------


class KeptNorm(nn.Module):
    """Group normalization over the kept channels only; the others are zero."""

    def __init__(self, norm: nn.GroupNorm, kept: list[int]) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, norm, kept = torch.zeros_like(x), self.norm, self.kept
        out[:, kept] = nn.functional.group_norm(
            x[:, kept], norm.num_groups, norm.weight[kept], norm.bias[kept], norm.eps
        )
        return out


def kept_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Return the indices of the rows of `before` that are left in `after`."""
    same = (after[:, None] == before[None]).flatten(2).all(2)
    assert same.any(1).all()
    return same.int().argmax(1).tolist()


def silence_(reader: nn.Linear | nn.Conv2d, kept: list[int], of: int, offset: int = 0) -> None:
    """Zero the weights of `reader` for the columns offset ... offset + of - 1 that are not kept."""
    reader.weight.data[:, [offset + i for i in range(of) if i not in kept]] = 0.0


def silenced(original: nn.Module, small: Any) -> nn.Module:
    """Return `original` with the channels that `small` lacks silenced in the layers that read them."""
    masked = copy.deepcopy(original)
    for name, module in list(masked.named_modules()):
        full: Any = module
        if isinstance(module, FeedForward):
            before, after = full.net[0].proj.weight, small.get_submodule(name).net[0].proj.weight
            inner, left = full.net[2].in_features, small.get_submodule(name).net[2].in_features
            kept = kept_rows(before[:inner], after[:left])
            for half in range(len(before) // inner):
                rows = kept_rows(before[half * inner : (half + 1) * inner], after[half * left : (half + 1) * left])
                assert rows == kept
            silence_(full.net[2], kept, inner)
        elif isinstance(module, ResnetBlock2D):
            kept = kept_rows(full.conv1.weight, small.get_submodule(name).conv1.weight)
            silence_(full.conv2, kept, full.conv1.out_channels)
            full.norm2 = KeptNorm(full.norm2, kept)
        elif isinstance(module, FluxSingleTransformerBlock):
            block, dim = small.get_submodule(name), full.attn.to_q.out_features
            silence_(full.proj_out, kept_rows(full.attn.to_q.weight, block.attn.to_q.weight), dim)
            mlp = kept_rows(full.proj_mlp.weight, block.proj_mlp.weight)
            silence_(full.proj_out, mlp, full.proj_mlp.out_features, offset=dim)
        elif isinstance(module, Attention | FluxAttention) and getattr(full, "to_out", None) is not None:
            kept = kept_rows(full.to_q.weight, small.get_submodule(name).to_q.weight)
            for reader in (full.to_out[0], getattr(full, "to_add_out", None)):
                if reader is not None:
                    silence_(reader, kept, full.to_q.out_features)
    return masked


@choices
@family
def test_a_pruned_model_equals_the_original_with_those_channels_silenced(
    name: str, method: str, scope: str, families: dict[str, Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = families[name]
    small = prune(checkpoint, settings(method, scope), context(checkpoint))
    expected = output_of(checkpoint, silenced(checkpoint.model, small.model))
    assert (expected - output_of(checkpoint)).abs().max() > 1e-2  # the removed channels mattered
    torch.testing.assert_close(output_of(small), expected, atol=1e-5, rtol=0)


# --- shapes and reloading ----------------------------------------------------------------------------------------


@family
def test_pruned_layers_lose_the_requested_share_of_their_weights(
    name: str, families: dict[str, Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = families[name]
    small = prune(checkpoint, settings(ratio=0.25), context(checkpoint))
    weights = []
    for model in (checkpoint.model, small.model):
        layers = {m.layer for g in attentions(model) + coupled(model) for m in g.members if m.side in ("out", "in")}
        weights.append(sum(layer.weight.numel() for layer in layers))
    assert weights[1] == 0.75 * weights[0]  # all widths and head counts here are divisible
    assert output_of(small).shape == output_of(checkpoint).shape


@choices
@family
def test_a_pruned_model_is_rebuilt_from_its_config_and_widths(
    name: str, method: str, scope: str, families: dict[str, Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = families[name]
    small = prune(checkpoint, settings(method, scope), context(checkpoint))
    kind, config, _ = FAMILIES[name]
    again = kind(**config).eval()
    apply_widths_(again, changed_widths(small.model, checkpoint.source.original), "here")
    again.load_state_dict(small.model.state_dict())
    adapter_for(again).refresh_(again)
    assert torch.equal(output_of(small), output_of(small, again))
    for module, other in zip(small.model.modules(), again.modules(), strict=True):
        for stored in ("heads", "inner_dim", "inner_kv_dim", "sliceable_head_dim", "mlp_hidden_dim", "out_channels"):
            assert getattr(module, stored, None) == getattr(other, stored, None)


@family
def test_a_pruned_model_can_be_pruned_again(
    name: str, families: dict[str, Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = families[name]
    small = prune(checkpoint, settings(), context(checkpoint))
    again = prune(small, settings(ratio=0.4), context(small))
    expected = output_of(checkpoint, silenced(checkpoint.model, again.model))
    torch.testing.assert_close(output_of(again), expected, atol=1e-5, rtol=0)


@family
def test_stored_sizes_follow_the_widths_and_the_residual_stream_keeps_its_width(
    name: str, families: dict[str, Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = families[name]
    small = prune(checkpoint, settings(), context(checkpoint))
    before = dict(checkpoint.model.named_modules())
    for path, module in small.model.named_modules():
        if isinstance(module, Attention | FluxAttention):
            assert module.heads == 0.75 * before[path].heads
            assert module.inner_dim == module.to_q.out_features == 0.75 * before[path].to_q.out_features
        if isinstance(module, Attention):
            assert module.inner_kv_dim == module.inner_dim and module.sliceable_head_dim == module.heads
            assert module.out_dim == before[path].out_dim
        if isinstance(module, FluxSingleTransformerBlock):
            assert module.mlp_hidden_dim == 96 and module.proj_out.in_features == 96 + 24
            assert module.proj_out._tp_packed_row_blocks == [24, 96]
        if isinstance(module, ResnetBlock2D):
            assert module.out_channels == module.conv2.out_channels == before[path].out_channels
            assert module.conv1.out_channels == module.norm2.num_channels == 0.75 * before[path].out_channels


def test_attention_slicing_still_works(families: dict[str, Checkpoint], context: Callable[..., Context]) -> None:
    small = prune(families["sd"], settings(), context(families["sd"]))
    expected = output_of(small)
    model: Any = small.model
    model.set_attention_slice("auto")
    torch.testing.assert_close(output_of(small), expected, atol=1e-5, rtol=0)


# --- which channels ------------------------------------------------------------------------------------------------


def test_equally_many_channels_are_removed_from_each_normalization_group(
    families: dict[str, Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = families["sd"]
    small = prune(checkpoint, settings(), context(checkpoint))
    before: Any = checkpoint.model
    after: Any = small.model
    kept = kept_rows(before.mid_block.resnets[0].conv1.weight, after.mid_block.resnets[0].conv1.weight)
    assert [sum(i // 8 == run for i in kept) for run in range(8)] == [6] * 8


def test_a_head_that_matters_only_to_the_text_is_kept(
    families: dict[str, Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = families["sd3"]
    model: Any = checkpoint.clone_model()
    attention = model.transformer_blocks[0].attn
    image = [attention.to_q, attention.to_k, attention.to_v]
    text = [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
    with torch.no_grad():
        for layer in image + text:
            layer.weight[8:16] *= 0.5  # head 1: weaker in both streams
        for layer, factor in [(layer, 0.01) for layer in image] + [(layer, 10.0) for layer in text]:
            layer.weight[16:24] *= factor  # head 2: weak for the image, strong for the text
    small = prune(checkpoint.evolve(model=model), settings(), context(checkpoint))
    pruned: Any = small.model
    kept = kept_rows(attention.to_v.weight, pruned.transformer_blocks[0].attn.to_v.weight)
    assert kept == [*range(8), *range(16, 32)]


def test_taylor_sums_weight_times_gradient_over_both_halves_and_the_reader(
    families: dict[str, Checkpoint], context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = families["sd"]
    inputs = dummy_inputs(checkpoint.spec, 2)

    def loss(model: nn.Module, *_: object) -> torch.Tensor:
        return adapter_for(model).forward(model, inputs).square().mean()

    monkeypatch.setattr("diffpress.compress.pruning.importance.epsilon_loss", loss)
    small = prune(checkpoint, settings("taylor"), context(checkpoint))

    path = "mid_block.attentions.0.transformer_blocks.0.ff"
    original = checkpoint.clone_model()
    loss(original).backward()
    before: Any = original.get_submodule(path)
    after: Any = small.model.get_submodule(path)
    writer, reader = before.net[0].proj, before.net[2]
    terms = (writer.weight * writer.weight.grad).abs().sum(1).reshape(2, -1).sum(0)
    terms = terms + (reader.weight * reader.weight.grad).abs().sum(0)
    count = len(terms) * 3 // 4
    assert kept_rows(writer.weight, after.net[0].proj.weight[:count]) == sorted(
        terms.argsort(descending=True)[:count].tolist()
    )


@family
def test_no_two_groups_share_a_side_of_a_layer(name: str, families: dict[str, Checkpoint]) -> None:
    model = families[name].model
    for groups in (attentions(model), coupled(model)):
        sides = [{(m.layer, m.side) for m in group.members} for group in groups]
        assert groups and len(set().union(*sides)) == sum(len(side) for side in sides)


def test_heads_that_cannot_be_pruned_are_not_listed() -> None:
    grouped = Attention(32, heads=4, kv_heads=2, dim_head=8)
    added: Any = UNet2DConditionModel(
        **{
            **UNET,
            "down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        }
    )
    assert attentions(nn.ModuleList([grouped])) == [] and attentions(added) == []
    assert len(attentions(nn.ModuleList([Attention(32, heads=4, dim_head=8)]))) == 1
