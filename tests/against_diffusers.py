"""What both sides of a comparison with diffusers share: the noise, the prompts, two samplers and the PSNR.

    checkpoint = with_short_plan(load_checkpoint(folder), steps=3)
    psnr_db(sampled_in_torch(checkpoint), sampled_by_diffusers(folder, checkpoint))

Both samplers use the same weights, noise, prompts and scheduler, so only the order of float32 additions differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.components import component_names, encode_prompts, load_component
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.runtime.image_inputs.control_networks import Control
from diffpress.runtime.image_size import resized
from diffpress.runtime.network_inputs import ConditioningInputs, class_conditioning
from diffpress.runtime.outputs import DECODER
from diffpress.runtime.requested_plan import requested_plan
from diffpress.runtime.sampler import generate, noise_for
from tests.pipelines import sampled

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS, LABELS, SEEDS = ["a photo of a cat", "Red dog!"], [3, 7], [0, 1]
# the pipelines' default lengths, which the adapters use; the tiny tokenizers' limit would lower them
T5_LENGTHS = {"sd3": 256, "sd3.5": 256, "flux": 512, "flux-schnell": 512, "pixart-alpha": 120, "pixart-alpha-1024": 120}
T5_LENGTHS["pixart-sigma"] = 300


def with_short_plan(checkpoint: Checkpoint, steps: int, guidance: float | None = None) -> Checkpoint:
    """Return the checkpoint with a short plan and a small size; Flux's config does not store its size."""
    spec = checkpoint.spec
    if checkpoint.source.kind == "FluxTransformer2DModel":
        spec = resized(spec, (32, 32))
    return checkpoint.evolve(spec=spec.with_plan(requested_plan(spec, steps, None, None, guidance)))


def sampled_in_torch(
    checkpoint: Checkpoint, negatives: Sequence[str] | None = None, control: Control | None = None
) -> np.ndarray:
    """Sample images [N, 3, H, W] in [0, 1] with the runtime's sampler and torch networks."""
    spec, conditioning = checkpoint.spec, ConditioningInputs()
    if spec.conditioning.kind == "text":
        uncond = encode_prompts(checkpoint, negatives)
        uncond = {name: np.broadcast_to(array, (len(SEEDS), *array.shape[1:])) for name, array in uncond.items()}
        conditioning = ConditioningInputs(encode_prompts(checkpoint, PROMPTS), uncond)
    elif spec.conditioning.kind == "class":
        conditioning = class_conditioning(spec, np.array(LABELS))
    conditioning = replace(conditioning, control=control)
    images = latents = generate(TorchNetwork(checkpoint.model, spec), spec, SEEDS, conditions=conditioning)
    if DECODER in component_names(checkpoint):
        latents = latents / np.float32(spec.latent_scale) + np.float32(spec.latent_shift)
        images = load_component(checkpoint, DECODER).run_all({"latent_sample": latents})["sample"]
    return np.clip(images, -1, 1) / 2 + 0.5


def sampled_by_diffusers(folder: Path, checkpoint: Checkpoint, number: int = 2, **options: Any) -> np.ndarray:
    """Sample images [N, 3, H, W] in [0, 1] with diffusers' pipeline, from the noise of SEEDS.

    LCM adds noise at every step; it receives the noise streams of the seeds one after the other.
    """
    spec, kind = checkpoint.spec, folder.name
    pipe = options.pop("pipe", None) or DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    noise = torch.from_numpy(noise_for(SEEDS[:number], spec.sample_shape))
    options = {"steps": spec.plan.steps, **options}
    if kind in T5_LENGTHS:
        options["max_sequence_length"] = T5_LENGTHS[kind]
    streams = itertools.count(1)

    def stream(*_: Any, **__: Any) -> Tensor:
        return torch.from_numpy(noise_for(SEEDS[:number], spec.sample_shape, stream=next(streams)))

    with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", stream):
        images = sampled(pipe, noise, PROMPTS[:number], LABELS[:number], **options)
    return np.asarray(images)


def psnr_db(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the PSNR of images in [0, 1], finite also for equal images."""
    assert ours.shape == theirs.shape and theirs.std() > 0.02, "a constant image cannot be compared"
    return float(-10 * np.log10(np.mean((ours - theirs) ** 2, dtype=np.float64) + 1e-20))
