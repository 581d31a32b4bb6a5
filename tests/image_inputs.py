"""Image to image and inpainting on both sides of a comparison with diffusers: same images, masks, noise and prompts.

diffusers draws noise for the encoder, the start and every step of a stochastic scheduler; here all of it is the noise
that the runtime draws for SEEDS.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.components import encode_prompts, load_component
from diffpress.compress.models.latent_encoder import load_encoder
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.image_inputs.control_networks import Control
from diffpress.runtime.image_inputs.encode import image_start
from diffpress.runtime.image_inputs.request import ImageRequest
from diffpress.runtime.image_inputs.start import ENCODER_STREAM, MASKED_STREAM
from diffpress.runtime.image_inputs.strength import with_strength
from diffpress.runtime.network_inputs import ConditioningInputs, class_conditioning
from diffpress.runtime.outputs import DECODER
from diffpress.runtime.pipeline import decoded
from diffpress.runtime.sampler import generate, noise_for
from tests.against_diffusers import LABELS, PROMPTS, SEEDS, T5_LENGTHS
from tests.pipelines import flux_fill, sd_inpaint, sdxl_inpaint

SD, SDXL, SD3, FLUX = "StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"
PREFIXES = {"sd": SD, "sd2-v": SD, "sdxl": SDXL, "sd3": SD3, "sd3.5": SD3, "flux": FLUX, "flux-schnell": FLUX}
PREFIXES["lcm"] = "LatentConsistencyModel"
# networks that read the masked image
INPAINTING = {"sd-inpaint": (SD, sd_inpaint), "sdxl-inpaint": (SDXL, sdxl_inpaint), "flux-fill": (FLUX, flux_fill)}


def pictures(size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Return one smooth picture for each of SEEDS, uint8 [2, H, W, C]."""
    rows, columns = np.meshgrid(np.linspace(0, 3, size[0]), np.linspace(0, 3, size[1]), indexing="ij")
    waves = [np.sin(rows * (1 + k) + columns * (3 - k) + k) for k in range(2 * channels)]
    return (
        np.round(127.5 * (1 + np.stack(waves, -1))).astype(np.uint8).reshape(*size, 2, channels).transpose(2, 0, 1, 3)
    )


def masks(size: tuple[int, int]) -> np.ndarray:
    """Return one mask for each of SEEDS, whose edges do not lie between latent cells, bool [2, H, W]."""
    found = np.zeros((2, *size), bool)
    found[0, size[0] // 4 + 1 :, : size[1] // 2 + 1] = True
    found[1, :, size[1] // 3 :] = True
    return found


def request(size: tuple[int, int], strength: float, masked: bool = False, overlay: bool = False) -> ImageRequest:
    """Return a request to start from `pictures`."""
    return ImageRequest(pictures(size), masks(size) if masked else None, strength, overlay)


def sampled_in_torch(checkpoint: Checkpoint, images: ImageRequest, control: Control | None = None) -> np.ndarray:
    """Sample images [N, 3, H, W] in [0, 1] with the runtime's sampler and torch networks."""
    spec, first = with_strength(checkpoint.spec, images.strength)
    conditions = ConditioningInputs()
    if spec.conditioning.kind == "text":
        uncond = None
        if is_guided(spec, spec.plan.guidance):
            uncond = {name: np.repeat(array, 2, 0) for name, array in encode_prompts(checkpoint, None).items()}
        conditions = ConditioningInputs(encode_prompts(checkpoint, PROMPTS), uncond)
    elif spec.conditioning.kind == "class":
        conditions = class_conditioning(spec, np.array(LABELS))
    conditions = replace(conditions, control=control)
    network = TorchNetwork(checkpoint.model, spec)
    if spec.is_picture:
        start = image_start(images, spec, first, len(SEEDS), None)
        return generate(network, spec, SEEDS, conditions=conditions, image=start).clip(-1, 1) / 2 + 0.5
    encoder, decoder = load_encoder(checkpoint), load_component(checkpoint, DECODER)
    start = image_start(images, spec, first, len(SEEDS), lambda x: encoder.run_all({"sample": x})["latent_parameters"])
    latents = generate(network, spec, SEEDS, conditions=conditions, image=start)
    found = decoded(lambda x: decoder.run_all({"latent_sample": x})["sample"], latents, spec)
    return start.overlaid(found) / 2 + 0.5


def sampled_by_diffusers(
    folder: Path, checkpoint: Checkpoint, images: ImageRequest, *, number: int = 2, **options: Any
) -> np.ndarray:
    """Sample images [N, 3, H, W] in [0, 1] with diffusers' pipeline for image to image or inpainting."""
    spec, prefix = checkpoint.spec, {**PREFIXES, **{k: v[0] for k, v in INPAINTING.items()}}[folder.name]
    task = "Fill" if folder.name == "flux-fill" else "Img2Img" if images.masks is None else "Inpaint"
    kind = getattr(diffusers, f"{prefix}{task}Pipeline")
    given: Any = options.pop("pipe", None)
    components = dict((given or DiffusionPipeline.from_pretrained(folder)).components)
    components |= {"requires_safety_checker": False} if prefix == SD else {}
    pipe: Any = given if "controlnet" in components else kind(**components)
    pipe.set_progress_bar_config(disable=True)
    options |= {"image": [Image.fromarray(pixels) for pixels in images.pixels[:number]], "strength": images.strength}
    if images.masks is not None:
        options["mask_image"] = [Image.fromarray(mask) for mask in images.masks[:number]]
    if images.masks is not None or prefix in (SD3, FLUX):
        options |= dict(zip(("height", "width"), images.size, strict=True))
    if prefix in (SD3, FLUX):
        options["max_sequence_length"] = T5_LENGTHS[{SD3: "sd3", FLUX: "flux"}[prefix]]
    options = {"num_inference_steps": spec.plan.steps, "guidance_scale": spec.plan.guidance, **options}
    first = with_strength(spec, images.strength)[1]
    skipped = spec.conditioning.inpainting == "mask" and images.strength == 1.0
    with seeded(pipe, spec.sample_shape, number, first, skipped), torch.no_grad():
        if kind is not diffusers.StableDiffusion3InpaintPipeline:
            return np.asarray(pipe(prompt=PROMPTS[:number], output_type="pt", **options).images)
        # diffusers 0.42 forgets the shift when it decodes here, unlike its other pipelines of Stable Diffusion 3
        latents = pipe(prompt=PROMPTS[:number], output_type="latent", **options).images
        config = pipe.vae.config
        found = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        return np.asarray(found.clamp(-1, 1) / 2 + 0.5)


def sampled_by_scheduler(pipe: Any, checkpoint: Checkpoint, images: ImageRequest) -> np.ndarray:
    """Sample images [N, C, H, W] in [0, 1] with the scheduler and networks of a pipeline that takes no image itself."""
    spec, scheduler = checkpoint.spec, pipe.scheduler
    scheduler.set_timesteps(spec.plan.steps)
    first = with_strength(spec, images.strength)[1]
    pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.from_numpy(noise_for(SEEDS, spec.sample_shape))
    autoencoder = getattr(pipe, "vqvae", None) or getattr(pipe, "vae", None)
    labels = (torch.tensor(LABELS),) if spec.conditioning.kind == "class" else ()
    scale = 1.0 if autoencoder is None else autoencoder.config.scaling_factor
    with seeded(pipe, spec.sample_shape, len(SEEDS), first), torch.no_grad():
        clean: Any = pixels if autoencoder is None else autoencoder.encode(pixels)
        if autoencoder is not None:
            clean = (clean.latent_dist.sample() if hasattr(clean, "latent_dist") else clean.latents) * scale
        timesteps = scheduler.timesteps[first:]
        x = scheduler.add_noise(clean, noise, timesteps[:1])
        for t in timesteps:
            model = pipe.transformer if labels else pipe.unet
            out = model(x, t.expand(len(x)), *labels).sample[:, : x.shape[1]]
            x = scheduler.step(out, t, x).prev_sample
        found = x if autoencoder is None else autoencoder.decode(x / scale).sample
    return np.asarray(found.clamp(-1, 1) / 2 + 0.5)


@contextlib.contextmanager
def seeded(pipe: Any, shape: tuple[int, ...], number: int, first: int, skipped: bool = False) -> Iterator[None]:
    """Replace every noise that a pipeline draws with that of the runtime for the seeds, from step `first` on.

    `skipped` means that the pipeline encodes the masked image alone.
    """
    streams, encoded = itertools.count(first + 1), iter((ENCODER_STREAM, MASKED_STREAM)[skipped:])

    def noise(stream: int) -> torch.Tensor:
        return torch.from_numpy(noise_for(SEEDS[:number], shape, stream))

    drawn = {
        sys.modules[type(pipe).__module__]: lambda *_, **__: noise(0),
        sys.modules["diffusers.models.autoencoders.vae"]: lambda *_, **__: noise(next(encoded)),
        sys.modules[type(pipe.scheduler).__module__]: lambda *_, **__: noise(next(streams)),
    }
    with contextlib.ExitStack() as stack:
        for module, draw in drawn.items():
            if hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield
