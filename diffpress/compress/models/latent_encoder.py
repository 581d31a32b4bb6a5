"""The encoder of a pipeline's autoencoder: images [B, C, H, W] to the samples [B, c, h, w] that its model denoises.

    sample = latent_scale (latent - latent_shift)

    vae_encoder    sample f32 [B, C, H, W]  ->  latent_parameters f32 [B, 2 c, h, w], mean and log variance, or
                                                [B, c, h, w] of an autoencoder without a distribution, as VQModel

The latent that training uses is the mean of the distribution. Names of the graph are those of optimum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.components import Component, Tensors
from diffpress.compress.sources.autoencoder import Autoencoder, autoencoder_of
from diffpress.compress.sources.pretrained import load_diffusers_model
from diffpress.compress.sources.weights import weight_files
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.encode import ENCODER

PIXELS_TOGETHER = 2**21  # of the images encoded together: eight of 512 x 512
MOST_TOGETHER = 64


def encoding_autoencoder(checkpoint: Checkpoint) -> Autoencoder:
    """Return the pipeline's autoencoder, whose encoder is needed.

    Raises:
        InvalidInputError: The pipeline has none, or it has no weights of the encoder.
    """
    found = autoencoder_of(checkpoint)
    if found is None:
        raise InvalidInputError(
            "the model learns from latents, but it came without an autoencoder that encodes images; load the whole "
            "pipeline's folder"
        )
    for file in weight_files(found.folder):
        with safe_open(file, framework="pt") as tensors:
            if any(name.startswith("encoder.") for name in tensors.keys()):
                return found
    raise InvalidInputError(f"{found.folder}: has no weights of the encoder, so it cannot encode images")


def load_encoder(checkpoint: Checkpoint) -> Component:
    """Load the encoder to run or to export; raises InvalidInputError as in `encoding_autoencoder`."""
    found = encoding_autoencoder(checkpoint)
    module: Any = load_diffusers_model(found.folder, found.kind)
    del module.decoder  # not needed for encoding
    size = checkpoint.spec.image_size
    images = torch.rand(2, module.config.in_channels, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    axes = {"sample": {0: "batch", 2: "image_height", 3: "image_width"}}
    examples, outputs = {"sample": images}, ["latent_parameters"]
    return Component(ENCODER, found.component, found.config, module, _encode, examples, outputs, axes)


def _encode(module: Any, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    (found,) = module.encode(inputs["sample"], return_dict=False)
    return (found if isinstance(found, torch.Tensor) else found.parameters,)


def encode_images(checkpoint: Checkpoint, images: np.ndarray) -> Iterator[np.ndarray]:
    """Encode images, uint8 [N, C, H, W], batch by batch into samples, float32 [B, c, h, w].

    Raises:
        InvalidInputError: As in `encoding_autoencoder`, or its weights cannot be read.
    """
    spec, (low, high) = checkpoint.spec, checkpoint.spec.data_range
    autoencoder = encoding_autoencoder(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module: Any = load_diffusers_model(autoencoder.folder, autoencoder.kind).to(device)
    batch = min(MOST_TOGETHER, max(1, PIXELS_TOGETHER // (images.shape[2] * images.shape[3])))
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start : start + batch]).to(device).float() * ((high - low) / 255.0) + low
        with torch.no_grad():
            found = module.encode(pixels)
        latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        yield (latents.float().cpu().numpy() - np.float32(spec.latent_shift)) * np.float32(spec.latent_scale)
