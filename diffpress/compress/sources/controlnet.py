"""ControlNets on disk that fit a checkpoint's U-Net: diffusers folders, or ids of the hub.

A ControlNet is a copy of the encoder of the U-Net that it was trained for, so that their configs have to agree. It may
control a U-Net that was pruned since: compress/models/control_network.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.sources.hub import download_model
from diffpress.compress.sources.layout import first_line
from diffpress.compress.sources.pretrained import quiet_libraries
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json

UNET, CONTROLNET, UNION = "UNet2DConditionModel", "ControlNetModel", "ControlNetUnionModel"
# entries that have to be those of the U-Net
SHARED = (
    "block_out_channels",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
)


@dataclass(frozen=True)
class ControlSource:
    """A control network on disk.

    Attributes:
        name: Name of its graph in the bundle: controlnet, controlnet_2, ...
        folder: Its folder.
        kind: Its class.
        config: Its config.json.
    """

    name: str
    folder: Path
    kind: str
    config: dict[str, Any]


def control_sources(checkpoint: Checkpoint, controlnets: Sequence[str]) -> list[ControlSource]:
    """Return the ControlNets in these folders or of these hub ids; hub ids are downloaded.

    Raises:
        InvalidInputError: One is missing, of another class, or was trained for another U-Net.
    """
    if controlnets and type(checkpoint.model).__name__ != UNET:
        raise InvalidInputError(
            f"controlnet {controlnets[0]}: the model is {type(checkpoint.model).__name__}; ControlNets are supported "
            f"for {UNET} (Stable Diffusion 1 and 2, SDXL)"
        )
    return [_controlnet(checkpoint, text, index) for index, text in enumerate(controlnets)]


def _controlnet(checkpoint: Checkpoint, text: str, index: int) -> ControlSource:
    folder = Path(text) if Path(text).is_dir() else download_model(text, "controlnet")
    where = folder / "config.json"
    config = read_json(where, hint="give the folder of a ControlNet, with config.json and safetensors")
    kind = str(config.get("_class_name"))
    if kind == UNION:
        raise InvalidInputError(
            f"{where}: '{UNION}' holds several ControlNets, of which each image chooses one; this is not supported: "
            f"give one {CONTROLNET} for each kind of image"
        )
    if kind != CONTROLNET:
        raise InvalidInputError(f"{where}: class '{kind}' is no ControlNet that is supported (supported: {CONTROLNET})")
    try:
        with quiet_libraries(), init_empty_weights(include_buffers=False):
            complete = {**diffusers.ControlNetModel.from_config(config).config}
    except Exception as error:  # torch and diffusers raise many types for invalid settings
        raise InvalidInputError(f"{where}: {kind} cannot be built from it ({first_line(error)})") from error
    _check_fits(checkpoint, complete, where)
    name = "controlnet" if index == 0 else f"controlnet_{index + 1}"
    return ControlSource(name, folder, kind, config)


def _check_fits(checkpoint: Checkpoint, config: dict[str, Any], where: Path) -> None:
    """Check that a ControlNet with this config was trained for the checkpoint's U-Net before it was pruned."""
    model: Any = checkpoint.model
    unet, spec = dict(model.config), checkpoint.spec
    if config["global_pool_conditions"]:
        raise InvalidInputError(f"{where}: global_pool_conditions needs diffusers' guess mode, which is not supported")
    pairs = {entry: (_plain(config[entry]), _plain(unet[entry])) for entry in SHARED}
    pairs["layers_per_block"] = _layers(config), _layers(unet)
    pairs["cross_attention_dim"] = _width(config), _width(unet)
    pairs["in_channels"] = config["in_channels"], spec.sample_shape[0]
    for entry, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise InvalidInputError(
                f"{where}: {entry} is {theirs}, the U-Net has {ours}; the ControlNet was trained for another model"
            )
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    if factor != spec.latent_factor:
        raise InvalidInputError(
            f"{where}: reads images of {factor} pixels per cell of the latents along a side, the autoencoder has "
            f"{spec.latent_factor}; the ControlNet was trained for another model"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _layers(config: dict[str, Any]) -> list[int]:
    """Return the number of resnets of every down block."""
    layers = config["layers_per_block"]
    return [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)


def _width(config: dict[str, Any]) -> list[int]:
    """Return the width of the text states in every down block."""
    width = config["cross_attention_dim"]
    return [width] * len(config["block_out_channels"]) if isinstance(width, int) else list(width)
