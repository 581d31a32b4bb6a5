"""Images as samples of the denoiser: pixels in the data range, or latents of the autoencoder's encoder.

vae_encoder    sample float32 [B, C, H, W]  ->  latent_parameters float32 [B, 2 c, h, w], mean and log variance
[B, c, h, w] of an encoder without a distribution

clean = latent_scale (latent - latent_shift)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.request import ImageRequest, size_text
from diffpress.runtime.image_inputs.start import ImageStart, MaskedImage
from diffpress.runtime.io.images import IMAGE_MODES
from diffpress.runtime.spec import DenoiserSpec

ENCODER = "vae_encoder"
LOG_VARIANCE = (-30.0, 20.0)  # bounds of diffusers' DiagonalGaussianDistribution

Encode = Callable[[np.ndarray], np.ndarray]  # images [1, C, H, W] -> latent parameters


def image_start(request: ImageRequest, spec: DenoiserSpec, first: int, count: int, encode: Encode | None) -> ImageStart:
    """Return the start of `count` samples from the images of a request.

    Args:
        request: The images.
        spec: The denoiser's spec, at the images' size.
        first: Index of the first step.
        count: Number of samples.
        encode: The autoencoder's encoder; None if the samples are pixels.

    Raises:
        InvalidInputError: The number of images or masks is neither 1 nor `count`.
    """
    low, high = spec.data_range
    scale = np.float32((high - low) / 255.0)
    pixels = request.pixels.astype(np.float32).transpose(0, 3, 1, 2) * scale + np.float32(low)
    clean, std = (pixels, None) if encode is None else encoded(encode, pixels, spec)
    mask, keep, kept_pixels, masked = None, None, None, None
    if request.masks is not None:
        if request.overlay:
            keep, kept_pixels = ~request.masks[:, None], pixels
        if encode is not None and spec.conditioning.inpainting:
            masked = _masked_image(request.masks, pixels, spec, encode, count, request.prefix)
        else:
            mask = _cells(request.masks, spec)
    return ImageStart(
        clean=_for_each(clean, count, f"{request.prefix}image"),
        std=None if std is None else _for_each(std, count, f"{request.prefix}image"),
        first=first,
        mask=None if mask is None else _for_each(mask, count, f"{request.prefix}mask"),
        from_noise=request.masks is not None and request.strength == 1.0,
        pixels=None if kept_pixels is None else _for_each(kept_pixels, count, f"{request.prefix}image"),
        keep=None if keep is None else _for_each(keep, count, f"{request.prefix}mask"),
        masked=masked,
    )


def _masked_image(
    masks: np.ndarray, pixels: np.ndarray, spec: DenoiserSpec, encode: Encode, count: int, prefix: str
) -> MaskedImage:
    """Return what a network for inpainting reads: the image is 0 in the data range where it is repainted."""
    clean, std = encoded(encode, pixels * ~masks[:, None], spec)
    if spec.conditioning.inpainting == "mask":
        mask = _cells(masks, spec)
    else:
        factor, (height, width) = spec.latent_factor, spec.sample_shape[1:]
        mask = masks.reshape(-1, height, factor, width, factor).transpose(0, 2, 4, 1, 3)
        mask = mask.reshape(-1, factor**2, height, width).astype(np.float32)
    return MaskedImage(
        clean=_for_each(clean, count, f"{prefix}image"),
        std=None if std is None else _for_each(std, count, f"{prefix}image"),
        mask=_for_each(mask, count, f"{prefix}mask"),
    )


def _cells(masks: np.ndarray, spec: DenoiserSpec) -> np.ndarray:
    """Return masks of latent cells, float32 [M, 1, h, w]: the nearest pixel, as torch interpolates."""
    factor = spec.latent_factor
    return masks[:, None, ::factor, ::factor].astype(np.float32)


def encoded(encode: Encode, pixels: np.ndarray, spec: DenoiserSpec) -> tuple[np.ndarray, np.ndarray | None]:
    """Return mean and standard deviation of the images' latents in the denoiser's scale; None without a distribution.

    Images are encoded one at a time, since an encoder's memory grows with the batch.
    """
    found = np.concatenate([encode(image[None]) for image in pixels]).astype(np.float32)
    scale, channels = np.float32(spec.latent_scale), spec.sample_shape[0]
    mean = scale * (found[:, :channels] - np.float32(spec.latent_shift))
    if found.shape[1] == channels:
        return mean, None
    return mean, scale * np.exp(np.float32(0.5) * np.clip(found[:, channels:], *LOG_VARIANCE))


def check_image(request: ImageRequest | None, bundle: Bundle) -> None:
    """Check that a bundle can start from the images of a request, or from none.

    Raises:
        InvalidInputError: The model needs an image and a mask, the bundle has no encoder, or its samples are no
            pictures or have other channels.
    """
    spec = bundle.spec
    if spec.conditioning.inpainting and (request is None or request.masks is None):
        what = "image and mask" if request is None else f"{request.prefix}mask"
        raise InvalidInputError(f"{what}: the model is trained for inpainting and needs an image and a mask; give both")
    if request is None:
        return
    name = f"{request.prefix}image"
    if not bundle.is_latent and not spec.is_picture:
        raise InvalidInputError(
            f"{name}: the model samples {size_text(spec.sample_shape)} arrays, no pictures; leave it out"
        )
    channels = spec.sample_shape[0]
    if bundle.is_latent:
        if ENCODER not in bundle.manifest["graphs"]:
            raise InvalidInputError(
                f"{name}: {bundle.path} has no {ENCODER}, which turns an image into latents; export it again with "
                "--image-inputs"
            )
        inputs = bundle.manifest["graphs"][ENCODER]["inputs"]
        channels = next(iter(inputs.values()))["shape"][1]
    given = request.pixels.shape[3]
    if given != channels:
        modes = {count: mode for mode, count in IMAGE_MODES.items()}
        raise InvalidInputError(
            f"{name}: has {given} channels ({modes.get(given, 'no mode')}), the model's images have {channels} "
            f"({modes.get(channels, 'no mode')}); convert it"
        )


def _for_each(array: np.ndarray, count: int, name: str) -> np.ndarray:
    """Return the array as [count, ...] without a copy."""
    if len(array) not in (1, count):
        raise InvalidInputError(f"{name}: {len(array)} given for {count} samples; give one for each, or one for all")
    return np.broadcast_to(array, (count, *array.shape[1:]))
