"""Depth pruning: a network without blocks is the network that was built without them, with the same weights."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.block_features import compared_blocks
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.distillation.recover import recover
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.counts import count
from diffpress.compress.models.removable_blocks import transformer_blocks, unet_blocks
from diffpress.compress.models.removed_blocks import RemovedBlock, remove_blocks_, removed_blocks
from diffpress.compress.pruning.block_presets import preset_blocks
from diffpress.compress.pruning.config import PruneConfig, PruneDepthConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.teacher_data import TeacherData
from diffpress.runtime.errors import InvalidInputError
from tests.pipelines import fill_zeros_, unet

DEEP = {
    "sample_size": 16,
    "block_out_channels": (16, 16, 32, 32),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


def stable_diffusion(**config: Any) -> nn.Module:
    """Make a small U-Net with the stages and blocks of Stable Diffusion's."""
    torch.manual_seed(0)
    model: Any = unet(**{**DEEP, "layers_per_block": 2, **config})
    model.eval()
    fill_zeros_(model)
    return model


def text_inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sample, text = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 5, 32)))
    return sample, torch.tensor([20, 700]), text


def renamed(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Rename prefixes and leave out the weights whose prefix has the name ''."""
    result = {}
    for key, value in state.items():
        prefix = next((prefix for prefix in names if key.startswith(prefix)), None)
        if prefix is None:
            result[key] = value
        elif names[prefix]:
            result[names[prefix] + key.removeprefix(prefix)] = value
    return result


# the third pair of an up block becomes the second, and the second pairs are gone
BASE = {f"up_blocks.{i}.{part}.2.": f"up_blocks.{i}.{part}.1." for i in range(4) for part in ("resnets", "attentions")}
BASE |= {
    f"{side}_blocks.{i}.{part}.1.": ""
    for side in ("down", "up")
    for i in range(4)
    for part in ("resnets", "attentions")
}
TINY = {**BASE, "mid_block.": "", "down_blocks.3.": "", "up_blocks.0.": "", "down_blocks.2.downsamplers.": ""}
TINY |= {
    f"up_blocks.{i}.{part}.{old}.": f"up_blocks.{i - 1}.{part}.{new}."
    for i in (1, 2, 3)
    for part in ("resnets", "attentions")
    for old, new in ((0, 0), (2, 1))
}
TINY |= {f"up_blocks.{i}.upsamplers.": f"up_blocks.{i - 1}.upsamplers." for i in (1, 2)}
OUTER = {"block_out_channels": (16, 16, 32), "down_block_types": ("CrossAttnDownBlock2D",) * 3}
OUTER |= {"up_block_types": ("CrossAttnUpBlock2D",) * 3}
PUBLISHED: dict[Any, tuple[dict[str, Any], dict[str, str]]] = {
    "bk_sdm_base": ({"layers_per_block": 1}, BASE),
    "bk_sdm_small": ({"layers_per_block": 1, "mid_block_type": None}, {**BASE, "mid_block.": ""}),
    "bk_sdm_tiny": ({"layers_per_block": 1, "mid_block_type": None, **OUTER}, TINY),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_is_the_network_that_diffusers_builds_from_the_published_config(preset: Any) -> None:
    model = stable_diffusion()
    config, names = PUBLISHED[preset]
    expected = stable_diffusion(**config)
    expected.load_state_dict(renamed(model.state_dict(), names), strict=True)
    remove_blocks_(model, preset_blocks(model, preset))
    assert len(model.state_dict()) == len(expected.state_dict())
    with torch.no_grad():
        assert torch.equal(model(*text_inputs()).sample, expected(*text_inputs()).sample)


@pytest.mark.parametrize(
    ("preset", "millions"), [("bk_sdm_base", 579.4), ("bk_sdm_small", 482.3), ("bk_sdm_tiny", 323.4)]
)
def test_the_presets_of_stable_diffusion_have_the_published_numbers_of_parameters(preset: Any, millions: float) -> None:
    wide = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "norm_num_groups": 32}
    with torch.device("meta"):
        model: Any = unet(768, **{**DEEP, "layers_per_block": 2, **wide})
    remove_blocks_(model, preset_blocks(model, preset))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_preset_refuses_another_network(unet: Checkpoint, context: Callable[..., Context]) -> None:
    with pytest.raises(InvalidInputError, match="bk_sdm_small fits U-Nets like Stable Diffusion"):
        prune(unet, PruneDepthConfig(preset="bk_sdm_small"), context(unet))


# --- transformers ----------------------------------------------------------------------------------------------

# kind -> (removed block, config of the smaller network, prefix and number of the blocks)
TRANSFORMERS = {
    "dit": ("transformer_blocks.1", {"num_layers": 3}, {"num_layers": 2}),
    "pixart-alpha": ("transformer_blocks.0", {"num_layers": 3}, {"num_layers": 2}),
    "sd3": ("transformer_blocks.1", {"num_layers": 3}, {"num_layers": 2}),
    "flux": ("transformer_blocks.0", {"num_layers": 2, "num_single_layers": 2}, {"num_layers": 1}),
    "flux-single": ("single_transformer_blocks.1", {"num_single_layers": 3}, {"num_single_layers": 2}),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformer_without_a_block_is_one_built_with_a_layer_less(
    kind: str, tiny_folder: Callable[..., Path]
) -> None:
    name, larger, smaller = TRANSFORMERS[kind]
    checkpoint = load_checkpoint(tiny_folder(kind.removesuffix("-single")))
    kind_of_model: Any = type(checkpoint.model)
    build = kind_of_model.from_config
    torch.manual_seed(0)
    model = build({**checkpoint.source.config, **larger}).eval()
    fill_zeros_(model)
    expected = build({**checkpoint.source.config, **larger, **smaller}).eval()
    blocks, _, number = name.rpartition(".")
    following = range(int(number) + 1, 4)
    names = {f"{blocks}.{number}.": ""} | {f"{blocks}.{i}.": f"{blocks}.{i - 1}." for i in following}
    expected.load_state_dict(renamed(model.state_dict(), names), strict=True)
    remove_blocks_(model, [block for block in transformer_blocks(model) if block.name == name])
    forward, inputs = adapter_for(model).forward, dummy_inputs(checkpoint.spec, 2)
    with torch.no_grad():
        assert torch.equal(forward(model, inputs), forward(expected, inputs))


def test_blocks_that_others_need_are_not_offered(tiny_folder: Callable[..., Path]) -> None:
    dit, sd3 = (load_checkpoint(tiny_folder(kind)).model for kind in ("dit", "sd3"))

    def names(model: nn.Module) -> list[str]:
        listed = adapter_for(model).removable_blocks
        assert listed is not None
        return [block.name for block in listed(model)]

    # the output layer of a DiT reads the timestep embedding of block 0; the last block of SD3 writes no text states
    assert names(dit) == ["transformer_blocks.1"] and names(sd3) == ["transformer_blocks.0"]


# --- any module ------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self, adds: bool, scale: float) -> None:
        super().__init__()
        self.conv, self.adds, self.scale = nn.Conv2d(8, 8, 3, padding=1), adds, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.scale * torch.tanh(self.conv(x))
        return x + branch if self.adds else branch


class Blocks(nn.Module):
    """Residual blocks that add their input themselves, or leave it to their caller; `scales` are their strengths."""

    def __init__(self, adds: bool, scales: tuple[float, ...] = (0.5, 0.01, 1.0)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.blocks = nn.ModuleList(Branch(adds, scale) for scale in scales)
        self.adds = adds

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.first(sample)
        for block in self.blocks:
            x = block(x) if self.adds else x + block(x)
        return self.last(x)


@pytest.mark.parametrize("adds", [True, False])
def test_the_weakest_branch_of_a_custom_module_is_removed(
    adds: bool, custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = custom(Blocks(adds))
    small = prune(checkpoint, PruneDepthConfig(blocks=1, samples=2), context(checkpoint, data=False))
    assert removed_blocks(small.model) == {"blocks.1": "first" if adds else "zeros"}
    expected = Blocks(adds, (0.5, 1.0))
    expected.load_state_dict(renamed(checkpoint.model.state_dict(), {"blocks.1.": "", "blocks.2.": "blocks.1."}))
    inputs = dummy_inputs(checkpoint.spec, 2)
    with torch.no_grad():
        assert torch.equal(small.model(**inputs), expected(**inputs))


def test_a_module_without_removable_blocks_is_refused(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.conv(sample)

    checkpoint = custom(Flat())
    with pytest.raises(InvalidInputError, match=r"has no block that can be removed.*use kind width"):
        prune(checkpoint, PruneDepthConfig(blocks=1), context(checkpoint, data=False))


class Nested(nn.Module):
    """Blocks that have lists of their own, and whose caller reads an attribute of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        inner = [nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)) for _ in range(6)]
        self.blocks = nn.ModuleList(nn.Sequential(*inner[i : i + 2]) for i in (0, 2, 4))
        self.down_blocks = self.up_blocks = nn.ModuleList([nn.Identity()])  # not those of diffusers
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.first(sample)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return self.last(self.encoder(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x))


@pytest.mark.parametrize("settings", [{"blocks": 3}, {"target": {"params": 0.7}}, {"remove": ("blocks.1",)}])
def test_blocks_inside_blocks_are_removed_with_them(
    settings: dict[str, Any], custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = custom(Nested())
    small = prune(checkpoint, PruneDepthConfig(samples=1, **settings), context(checkpoint, data=False))
    # the caller of the encoder reads layers[0].self_attn, so only its second layer can go
    assert set(removed_blocks(small.model)) <= {"blocks.0", "blocks.1", "blocks.2", "encoder.layers.1"}
    assert removed_blocks(small.model)


# --- choice ----------------------------------------------------------------------------------------------------


def test_ablation_removes_the_block_whose_branch_is_zero(unet: Checkpoint, context: Callable[..., Context]) -> None:
    model = unet.clone_model()
    for name in ("mid_block.resnets.1", "up_blocks.0.attentions.1"):
        block: Any = model.get_submodule(name)
        last = block.conv2 if hasattr(block, "conv2") else block.to_out[0]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    checkpoint = unet.evolve(model=model)
    small = prune(checkpoint, PruneDepthConfig(blocks=2, samples=2), context(checkpoint))
    assert set(removed_blocks(small.model)) == {"mid_block.resnets.1", "up_blocks.0.attentions.1"}
    inputs = dummy_inputs(unet.spec, 2)
    forward = adapter_for(model).forward
    with torch.no_grad():
        torch.testing.assert_close(forward(small.model, inputs), forward(model, inputs), rtol=0, atol=1e-6)


def test_a_target_removes_no_block_that_could_stay(unet: Checkpoint, context: Callable[..., Context]) -> None:
    whole = count(unet.model, unet.spec)
    small = prune(unet, PruneDepthConfig(target={"params": 0.7}, samples=2), context(unet))
    assert count(small.model, unet.spec).parameters <= 0.7 * whole.parameters
    removed = [block for block in unet_blocks(unet.model) if block.name in removed_blocks(small.model)]
    assert len(removed) > 1
    for kept in removed:
        model = copy.deepcopy(unet.model)
        remove_blocks_(model, [block for block in removed if block is not kept])
        assert count(model, unet.spec).parameters > 0.7 * whole.parameters


def test_an_unreachable_target_names_the_smallest_network(unet: Checkpoint, context: Callable[..., Context]) -> None:
    model = unet.clone_model()
    remove_blocks_(model, unet_blocks(model))
    smallest = math.ceil(1000 * count(model, unet.spec).macs / count(unet.model, unet.spec).macs) / 1000
    with pytest.raises(InvalidInputError, match=rf"target macs 0.01 cannot be reached: at least {smallest:.3f} of the"):
        prune(unet, PruneDepthConfig(target={"macs": 0.01}, samples=1), context(unet))


def test_unknown_and_too_many_blocks_are_refused(unet: Checkpoint, context: Callable[..., Context]) -> None:
    with pytest.raises(InvalidInputError, match=r"prune: remove.*mid_block.resnets.7.*did you mean"):
        prune(unet, PruneDepthConfig(remove=("mid_block.resnets.7",)), context(unet))
    with pytest.raises(InvalidInputError, match=r"'conv_in' cannot be removed, because what it reads"):
        prune(unet, PruneDepthConfig(remove=("conv_in",)), context(unet))
    with pytest.raises(InvalidInputError, match=r"blocks = 99, but only \d+ blocks of this model can be removed: "):
        prune(unet, PruneDepthConfig(blocks=99), context(unet))


@pytest.mark.parametrize(
    "settings", [{}, {"blocks": 1, "preset": "bk_sdm_base"}, {"remove": ("a",), "target": {"macs": 0.5}}]
)
def test_the_blocks_are_chosen_in_exactly_one_way(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="exactly one of remove, preset, blocks and target"):
        PruneDepthConfig(**settings)


# --- later stages ----------------------------------------------------------------------------------------------


FRESH = """
import sys
import torch
import diffpress as dp
from diffpress.compress.distillation.block_features import compared_blocks
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.distillation.recover import recover
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
torch.set_num_threads(1)  # as in the test: sums depend on it
checkpoint = dp.load(sys.argv[1])
with torch.no_grad():
    out = adapter_for(checkpoint.model).forward(checkpoint.model, dummy_inputs(checkpoint.spec, 2))
torch.save(out, sys.argv[2])
"""


def test_depth_and_width_reload_in_a_fresh_process_to_the_same_outputs(
    unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    names = ("up_blocks.0.resnets.1", "up_blocks.1.resnets.1", "mid_block.resnets.0", "down_blocks.1.attentions.0")
    shallow = prune(unet, PruneDepthConfig(remove=names), context(unet))
    # the residual width shrinks as well, so the channels that a removed block passes on change
    small = prune(shallow, PruneConfig(method="magnitude", ratio=0.4, round_to=4), context(unet))
    before, after = (one.model.get_submodule("conv_in").weight for one in (unet, small))
    assert len(after) < len(before)  # type: ignore[arg-type]
    save_checkpoint(small, tmp_path / "small")
    record = json.loads((tmp_path / "small" / "diffpress.json").read_text())
    assert set(record["removed_blocks"]) == set(names)
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "small", tmp_path / "out.pt"], check=True)
    with torch.no_grad():
        expected = adapter_for(small.model).forward(small.model, dummy_inputs(small.spec, 2))
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)
    assert load_checkpoint(tmp_path / "small").hash == small.hash != shallow.hash


def test_other_layers_keep_their_names_and_weights(unet: Checkpoint, context: Callable[..., Context]) -> None:
    small = prune(unet, PruneDepthConfig(remove=("mid_block.resnets.0",)), context(unet))
    whole = unet.model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in small.model.state_dict().items())


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_recovers_with_the_features_that_can_be_compared(
    preset: Any, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = load_checkpoint(tiny_folder("sd"))
    teacher = loaded.evolve(model=stable_diffusion())
    ctx = Context(0, tmp_path, teacher, TeacherData(teacher, 4, tmp_path, ("a cat",)))
    small = prune(teacher, PruneDepthConfig(preset=preset), ctx)
    names = compared_blocks(teacher.model, small)
    assert {"down_blocks.0", "up_blocks.3"} <= set(names)
    assert ("mid_block" in names) == (preset == "bk_sdm_base")
    assert ("down_blocks.2" in names) == (preset != "bk_sdm_tiny")  # it no longer halves the resolution
    trained = recover(small, RecoverConfig(steps=2, batch=2, samples=4), ctx)
    assert removed_blocks(trained.model) == removed_blocks(small.model)


def test_a_preset_is_not_applied_twice(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load_checkpoint(tiny_folder("sd"))
    teacher = loaded.evolve(model=stable_diffusion())
    ctx = Context(0, tmp_path, teacher)
    small = prune(teacher, PruneDepthConfig(preset="bk_sdm_base"), ctx)
    with pytest.raises(InvalidInputError, match=r"down_blocks\.0\.resnets\.1 was removed before"):
        prune(small, PruneDepthConfig(preset="bk_sdm_small"), ctx)


def test_pruning_leaves_the_input_as_it_is(unet: Checkpoint, context: Callable[..., Context]) -> None:
    before = unet.hash
    small = prune(unet, PruneDepthConfig(blocks=1, samples=1), context(unet))
    with torch.no_grad():
        for parameter in small.model.parameters():
            parameter.add_(1.0)
    assert Checkpoint(unet.model, unet.spec, unet.source).hash == before
    assert not any(isinstance(module, RemovedBlock) for module in unet.model.modules())


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"mid_block.resnets.9": "first"}, "removed_blocks names 'mid_block.resnets.9'"),
        ({"mid_block.resnets.0": "half"}, "'half', not one of"),
        (["mid_block"], "must be a JSON object"),
        ({"mid_block": "first", "mid_block.resnets.0": "first"}, "removed_blocks names 'mid_block.resnets.0'"),
        ({"mid_block.resnets.0": "hidden"}, "reads no skip connection"),
    ],
)
def test_a_damaged_record_is_refused(
    record: Any, words: str, unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    small = prune(unet, PruneDepthConfig(remove=("mid_block.resnets.0",)), context(unet))
    save_checkpoint(small, tmp_path / "small")
    file = tmp_path / "small" / "diffpress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"removed_blocks": record}))
    with pytest.raises(InvalidInputError, match=r"diffpress\.json") as caught:
        load_checkpoint(tmp_path / "small")
    assert words in str(caught.value)
