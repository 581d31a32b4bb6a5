"""Tiny ControlNets, and sampling under control on both sides of a comparison with diffusers.

The ControlNets are copies of a tiny U-Net's encoder whose residuals are random instead of zero, so that they matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from PIL import Image
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.control_network import load_controlnet
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.sources.controlnet import control_sources
from diffpress.runtime.image_inputs.control import ControlRequest, read_control_request
from diffpress.runtime.image_inputs.control_networks import Control, make_control
from tests.against_diffusers import SEEDS, sampled_by_diffusers
from tests.pipelines import fill_zeros_

COUNT = len(SEEDS)


def tiny_controlnet(pipeline: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write a ControlNet for the U-Net of a tiny pipeline to `folder`, 2 pixels per cell."""
    unet = DiffusionPipeline.from_pretrained(pipeline, local_files_only=True).unet
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        # the weights of the copy do not matter; others make the copies of two seeds differ
        made = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(16, 32), load_weights_from_unet=False, **config
        )
        fill_zeros_(made)
        for layer in (*made.controlnet_down_blocks, made.controlnet_mid_block):
            nn.init.normal_(layer.weight, std=0.3)
        for layer in made.controlnet_cond_embedding.modules():  # otherwise the image hardly matters
            if isinstance(layer, nn.Conv2d):
                layer.weight *= 3.0
        nn.init.normal_(made.controlnet_cond_embedding.conv_out.weight, std=1.0)
    made.save_pretrained(folder, safe_serialization=True)
    return folder


def pictures(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return one control image for each of SEEDS: black with white blocks, uint8 [2, H, W, 3]."""
    cells = np.random.default_rng(seed).random((COUNT, size[0] // 4, size[1] // 4, 3)) > 0.5
    return np.repeat(np.repeat(cells, 4, axis=1), 4, axis=2).astype(np.uint8) * 255


def request(checkpoint: Checkpoint, networks: int = 1, **numbers: Any) -> ControlRequest:
    """Return a request with images of the spec's size for that many networks."""
    images = [pictures(checkpoint.spec.image_size, seed) for seed in range(networks)]
    found = read_control_request(images, **numbers)
    assert found is not None
    return found


def in_torch(checkpoint: Checkpoint, folders: Sequence[Path], wanted: ControlRequest) -> Control:
    """Return the control of SEEDS with torch networks."""
    sources = control_sources(checkpoint, [str(folder) for folder in folders])
    networks = [load_controlnet(checkpoint, source) for source in sources]
    controlled = TorchNetwork(checkpoint.model, checkpoint.spec)
    return make_control(wanted, controlled, networks, [3] * len(networks), COUNT)


def controlled_by_diffusers(
    folder: Path, checkpoint: Checkpoint, folders: Sequence[Path], wanted: ControlRequest, **options: Any
) -> np.ndarray:
    """Sample images [N, 3, H, W] in [0, 1] with diffusers' pipeline for ControlNets, from the noise of SEEDS."""
    images = [[Image.fromarray(pixels) for pixels in image.pixels] for image in wanted.given]
    nested = [list(of_sample) for of_sample in zip(*images, strict=True)]
    numbers: dict[str, Any] = {
        "guidance_scale": checkpoint.spec.plan.guidance,
        "controlnet_conditioning_scale": [image.scale for image in wanted.given],
        "control_guidance_start": [image.start for image in wanted.given],
        "control_guidance_end": [image.end for image in wanted.given],
    }
    if len(folders) == 1:
        numbers["controlnet_conditioning_scale"] = numbers["controlnet_conditioning_scale"][0]
    return sampled_by_diffusers(
        folder,
        checkpoint,
        pipe=controlled_pipeline(folder, folders),
        image=nested if len(images) > 1 else images[0],
        **numbers,
        **options,
    )


def controlled_pipeline(folder: Path, folders: Sequence[Path], task: str = "") -> Any:
    """Return diffusers' pipeline for ControlNets with the parts of a tiny pipeline."""
    networks = [ControlNetModel.from_pretrained(one, local_files_only=True) for one in folders]
    parts = dict(DiffusionPipeline.from_pretrained(folder, local_files_only=True).components)
    is_xl = folder.name.startswith("sdxl")
    parts |= {"controlnet": networks if len(networks) > 1 else networks[0]}
    parts |= {} if is_xl else {"requires_safety_checker": False}
    kind: Any = getattr(diffusers, f"StableDiffusion{'XL' * is_xl}ControlNet{task}Pipeline")
    return kind(**parts)
