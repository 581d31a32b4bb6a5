"""prune: {residual: ...}: the width of the residual stream, and everything that follows it.

Oracle: the class of diffusers, built with the smaller hidden size, with the original weights cut at the kept indices.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.kept_indices import Indices
from diffpress.compress.models.widths import changed_widths
from diffpress.compress.pruning.config import PruneConfig, PruneDepthConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from tests.compress.pruning.networks import Apply

# entries of the config of the same network with half of its heads and channels
HALF: dict[str, dict[str, Any]] = {
    "dit": {"num_attention_heads": 1},
    "pixart-alpha": {"num_attention_heads": 1, "cross_attention_dim": 24},
    "sd3": {"num_attention_heads": 1, "caption_projection_dim": 16},
    "sd3.5": {"num_attention_heads": 1, "caption_projection_dim": 16},
    "flux": {"num_attention_heads": 1},
    "sd": {"block_out_channels": [16, 32], "attention_head_dim": 2},
    "sd2-v": {"block_out_channels": [16, 32], "attention_head_dim": [1, 2]},
    "sdxl": {"block_out_channels": [16, 32], "attention_head_dim": [1, 2]},
}
FAMILIES = ("dit", "pixart-alpha", "sd3.5", "flux", "sdxl")
U_NETS = ("sd", "sd2-v", "sdxl")

Load = Callable[[str], Checkpoint]


@pytest.fixture
def load(tiny_folder: Callable[..., Path]) -> Load:
    return lambda kind: load_checkpoint(tiny_folder(kind))


@pytest.fixture
def pruned(tmp_path: Path) -> Callable[..., Checkpoint]:
    def run(checkpoint: Checkpoint, **settings: Any) -> Checkpoint:
        settings = {"method": "magnitude", "ratio": 0.5, "round_to": 4, "residual": True, **settings}
        return prune(checkpoint, PruneConfig(**settings), Context(0, tmp_path, checkpoint))

    return run


def output_of(checkpoint: Checkpoint, model: nn.Module | None = None) -> torch.Tensor:
    model = checkpoint.model if model is None else model
    with torch.no_grad():
        return adapter_for(model).forward(model, dummy_inputs(checkpoint.spec, 2, seed=5))


def kept(checkpoint: Checkpoint, name: str, dim: int) -> Indices:
    return checkpoint.kept_indices[name][dim]


def cut(tensor: torch.Tensor, indices: dict[int, Indices]) -> torch.Tensor:
    for dim, kept_of_dim in indices.items():
        tensor = tensor.index_select(dim, torch.from_numpy(kept_of_dim))
    return tensor


def built(kind: str, checkpoint: Checkpoint, small: Checkpoint) -> nn.Module:
    """Build the half network with diffusers alone, with the weights and position table of `checkpoint` cut to fit."""
    whole: Any = checkpoint.model
    model: Any = type(whole).from_config({**whole.config, **HALF[kind]}).eval()
    if kind in U_NETS:  # the sinusoids of the timestep are an input, whose width diffusers derives from the first level
        model.time_proj = whole.time_proj
        rows = model.time_embedding.linear_1.out_features
        model.time_embedding.linear_1 = nn.Linear(whole.time_proj.num_channels, rows)
    state = whole.state_dict()
    model.load_state_dict({name: cut(value, small.kept_indices.get(name, {})) for name, value in state.items()})
    table = "pos_embed.pos_embed"
    if table in small.kept_indices and table not in state:
        model.pos_embed.pos_embed = cut(whole.pos_embed.pos_embed, small.kept_indices[table])
    return model


# --- the oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HALF)
def test_a_pruned_model_is_the_smaller_model_of_diffusers_with_the_kept_weights(
    kind: str, load: Load, pruned: Callable[..., Checkpoint]
) -> None:
    checkpoint = load(kind)
    small = pruned(checkpoint)
    assert torch.equal(output_of(small), output_of(small, built(kind, checkpoint, small)))
    assert output_of(small).std() > 1e-3


def test_the_removed_channels_of_the_stream_have_the_least_importance_over_all_layers(
    load: Load, pruned: Callable[..., Checkpoint]
) -> None:
    checkpoint = load("dit")
    small, model = pruned(checkpoint), checkpoint.model
    weights: dict[str, torch.Tensor] = {name: p.detach().abs() for name, p in model.named_parameters()}
    score = weights["pos_embed.proj.weight"].sum((1, 2, 3)) + weights["proj_out_2.weight"].sum(0)
    score = score + weights["proj_out_1.weight"].sum(1).reshape(2, -1).sum(0)  # shift and scale
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        score = score + weights[f"{block}.norm1.linear.weight"].sum(1).reshape(6, -1).sum(0)
        heads = torch.from_numpy(kept(small, f"{block}.attn1.to_q.weight", 0))  # removed before
        for layer in ("to_q", "to_k", "to_v"):
            score = score + weights[f"{block}.attn1.{layer}.weight"][heads].sum(0)
        score = score + weights[f"{block}.attn1.to_out.0.weight"][:, heads].sum(1)
        score = score + weights[f"{block}.ff.net.0.proj.weight"].sum(0) + weights[f"{block}.ff.net.2.weight"].sum(1)
    expected = sorted(score.argsort(descending=True)[:16].tolist())
    stream = ("pos_embed.proj.weight", 0), ("pos_embed.pos_embed", 2), ("proj_out_2.weight", 1)
    for name, dim in (*stream, ("transformer_blocks.1.ff.net.2.bias", 0)):
        assert kept(small, name, dim).tolist() == expected
    modulation = [chunk * 32 + channel for chunk in range(6) for channel in expected]
    assert kept(small, "transformer_blocks.1.norm1.linear.weight", 0).tolist() == modulation


@pytest.mark.parametrize("kind", U_NETS)
def test_equally_many_channels_are_removed_from_each_normalization_group_over_skip_connections(
    kind: str, load: Load, pruned: Callable[..., Checkpoint]
) -> None:
    small = pruned(load(kind), ratio=0.25)
    found = [name for name in small.kept_indices if name.endswith("norm1.weight") and "resnets" in name]
    assert any(name.startswith("up_blocks.1") for name in found)
    before: Any = load(kind).model
    for name in found:
        norm = before.get_submodule(name.removesuffix(".weight"))
        shares = np.bincount(kept(small, name, 0) // (norm.num_channels // norm.num_groups), minlength=norm.num_groups)
        assert (shares == shares[0]).all() and 0 < shares[0] < norm.num_channels // norm.num_groups


@pytest.mark.parametrize(("round_to", "width"), [(4, 24), (8, 24), (16, 32)])
def test_the_width_of_the_stream_is_a_multiple_of_round_to(
    round_to: int, width: int, load: Load, pruned: Callable[..., Checkpoint]
) -> None:
    small: Any = pruned(load("dit"), ratio=0.2, round_to=round_to).model
    assert small.proj_out_2.in_features == width
    assert small.transformer_blocks[0].norm3.normalized_shape == (width,)


# --- saving, pruning again, removed blocks ----------------------------------------------------------------------


FRESH = """
import pathlib, sys, torch
import diffpress as dp
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
torch.set_num_threads(1)  # as in the test: sums depend on it
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    checkpoint = dp.load(folder)
    with torch.no_grad():
        out = adapter_for(checkpoint.model).forward(checkpoint.model, dummy_inputs(checkpoint.spec, 2, seed=5))
    torch.save(out, folder / "out.pt")
"""


def test_pruned_models_reload_in_a_fresh_process_to_the_same_outputs(
    load: Load, pruned: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    # a removed block of a U-Net passes on the channels of the stream
    saved, removed = {}, {"dit": "transformer_blocks.1", "sdxl": "up_blocks.1.resnets.1"}
    for kind in FAMILIES:
        checkpoint = load(kind)
        if kind in removed:
            depth = PruneDepthConfig(remove=(removed[kind],))
            checkpoint = prune(checkpoint, depth, Context(0, tmp_path, checkpoint))
        if kind == "dit":  # indices count from the unpruned network
            checkpoint = pruned(checkpoint, ratio=0.25)
        small = pruned(checkpoint, scope="global", method="random")
        save_checkpoint(small, tmp_path / "saved" / kind)
        saved[kind] = small
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "saved"], check=True)
    for kind, small in saved.items():
        out = torch.load(tmp_path / "saved" / kind / "out.pt", weights_only=True)
        assert torch.equal(out, output_of(small)), kind


TABLE = """
import torch
from safetensors.torch import load_file
from torch import nn

from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.out = nn.Conv2d(1, 16, 2, 2), nn.Linear(16, 4)
        self.norm = nn.LayerNorm(16, elementwise_affine=False)
        angles = torch.arange(16.0)[:, None] / 100.0 ** (torch.arange(16.0) / 16)
        self.register_buffer("positions", angles.sin(), persistent=False)

    def forward(self, sample, timestep):
        h = self.patch(sample).flatten(2).transpose(1, 2) + self.positions + timestep[:, None, None] / 50
        return self.out(self.norm(h)).transpose(1, 2).reshape(sample.shape)


def load(path):
    model, schedule = Tokens(), betas_schedule("linear", 50)
    model.load_state_dict(load_file(path))
    return model, DenoiserSpec("v", schedule, (1, 8, 8), make_plan("ddim", 3, schedule))
"""


def test_a_position_table_that_no_checkpoint_saves_is_cut_again_when_the_model_is_loaded(
    pruned: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    file, weights = tmp_path / "tokens.py", tmp_path / "tokens.safetensors"
    file.write_text(TABLE)
    patch, out = nn.Conv2d(1, 16, 2, 2), nn.Linear(16, 4)
    layers = {"patch": patch, "out": out}
    save_file({f"{n}.{k}": v.detach() for n, m in layers.items() for k, v in m.state_dict().items()}, weights)
    small = pruned(load_checkpoint(f"{file}:{weights}"), residual=None)
    assert "positions" not in small.model.state_dict() and kept(small, "positions", 1).size == 8
    save_checkpoint(small, tmp_path / "small")
    loaded = load_checkpoint(f"{file}:{tmp_path / 'small'}")
    assert torch.equal(output_of(loaded), output_of(small)) and loaded.model.positions.shape == (16, 8)
    assert loaded.kept_indices.keys() == small.kept_indices.keys()


# --- the setting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_the_stream_keeps_its_width_without_the_setting(
    kind: str, load: Load, pruned: Callable[..., Checkpoint]
) -> None:
    checkpoint = load(kind)
    default, inner = (pruned(checkpoint, residual=value) for value in (None, False))
    assert default.hash == inner.hash != pruned(checkpoint).hash
    first = "pos_embed.proj.weight" if kind == "dit" else "conv_in.weight"
    assert first not in default.kept_indices


def test_a_unet_without_text_prunes_the_stream_unless_the_setting_says_otherwise(
    load: Load, pruned: Callable[..., Checkpoint]
) -> None:
    checkpoint = load("ldm")
    default, stream, inner = (pruned(checkpoint, residual=value) for value in (None, True, False))
    assert default.hash == stream.hash != inner.hash
    assert "conv_in.weight" in stream.kept_indices and "conv_in.weight" not in inner.kept_indices
    widths = changed_widths(inner.model, checkpoint.source.original)
    assert widths["mid_block.resnets.0.conv1"] == {"in_channels": 64, "out_channels": 32, "groups": 1}
    assert output_of(inner).shape == output_of(checkpoint).shape


def test_a_custom_module_refuses_to_keep_a_stream_that_is_not_known(
    custom: Callable[..., Checkpoint], pruned: Callable[..., Checkpoint]
) -> None:
    layers = {"first": nn.Conv2d(1, 16, 3, padding=1), "last": nn.Conv2d(16, 1, 3, padding=1)}
    checkpoint = custom(Apply(lambda m, x, t: m.last(torch.tanh(m.first(x))), **layers))
    with pytest.raises(
        InvalidInputError, match=r"prune: residual = false needs a family whose blocks are known.*remove"
    ):
        pruned(checkpoint, residual=False)
    assert pruned(checkpoint).hash == pruned(checkpoint, residual=None).hash


def test_a_target_is_reached_over_the_residual_stream(load: Load, pruned: Callable[..., Checkpoint]) -> None:
    checkpoint = load("pixart-alpha")
    small = pruned(checkpoint, ratio=None, target={"params": 0.4}, scope="global")
    sizes = [sum(p.numel() for p in one.model.parameters()) for one in (checkpoint, small)]
    assert 0.3 * sizes[0] < sizes[1] <= 0.4 * sizes[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_layer_of_a_family_is_skipped(
    kind: str, load: Load, pruned: Callable[..., Checkpoint], caplog: pytest.LogCaptureFixture
) -> None:
    pruned(load(kind))
    assert not caplog.messages
