"""compress/sources/controlnet.py: ControlNets of other models, classes and kinds are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.sources.controlnet import control_sources
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError

CONFIG: dict[str, Any] = {
    "_class_name": "ControlNetModel",
    "in_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "conditioning_embedding_out_channels": [16, 32],
}


@pytest.fixture(scope="module")
def sd(tiny_folder: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_folder("sd"))


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        return str(tmp_path)

    return write


def test_graphs_are_named_in_the_order_of_the_images(sd: Checkpoint, written: Callable[..., str]) -> None:
    assert [source.name for source in control_sources(sd, [written()] * 3)] == [
        "controlnet",
        "controlnet_2",
        "controlnet_3",
    ]
    assert control_sources(sd, []) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "union": ({"_class_name": "ControlNetUnionModel"}, "'ControlNetUnionModel' holds several ControlNets"),
    "another class": ({"_class_name": "FluxControlNetModel"}, "class 'FluxControlNetModel' is no ControlNet"),
    "SD 2": ({"cross_attention_dim": 1024}, r"cross_attention_dim is \[1024, 1024\], the U-Net has \[32, 32\]"),
    "wider": ({"block_out_channels": [32, 128]}, r"block_out_channels is \[32, 128\], the U-Net has \[32, 64\]"),
    "deeper": ({"layers_per_block": 2}, r"layers_per_block is \[2, 2\], the U-Net has \[1, 1\]"),
    "16 channels": ({"in_channels": 16}, "in_channels is 16, the U-Net has 4"),
    "SDXL": (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 88,
        },
        "addition_embed_type is text_time, the U-Net has None",
    ),
    "another autoencoder": (
        {"conditioning_embedding_out_channels": [16, 32, 96, 256]},
        "reads images of 8 pixels per cell .* has 2",
    ),
    "guess mode": ({"global_pool_conditions": True}, "global_pool_conditions needs diffusers' guess mode"),
    "no model": ({"attention_head_dim": None, "norm_num_groups": 7}, "ControlNetModel cannot be built from it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name: str, sd: Checkpoint, written: Callable[..., str]) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(InvalidInputError, match=message) as caught:
        control_sources(sd, [written(**changes)])
    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist_is_refused(sd: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="controlnet nowhere: no such folder, and not a hub id"):
        control_sources(sd, ["nowhere"])
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        control_sources(sd, [str(tmp_path)])


def test_other_families_have_no_controlnets(tiny_folder: Callable[..., Path], written: Callable[..., str]) -> None:
    with pytest.raises(InvalidInputError, match="the model is SD3Transformer2DModel; ControlNets are supported for"):
        control_sources(load_checkpoint(tiny_folder("sd3")), [written()])
