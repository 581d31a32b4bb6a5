"""runtime/image_inputs/encode.py: pixels or latents of the images, masks of latent cells, and what a bundle accepts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.encode import check_image, image_start
from diffpress.runtime.image_inputs.request import ImageRequest
from diffpress.runtime.image_size import sized
from diffpress.runtime.io.images import to_uint8
from diffpress.runtime.noise_schedule import flow_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

SCHEDULE = flow_schedule()
PIXELS = DenoiserSpec("flow", SCHEDULE, (3, 8, 8), make_plan("euler", 4, SCHEDULE))
LATENTS = replace(PIXELS, sample_shape=(4, 4, 4), latent_factor=2, latent_scale=0.5, latent_shift=0.25)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
MASKS = np.random.default_rng(1).random((2, 8, 8)) > 0.5


def test_pixels_come_back_as_they_were_in_any_data_range() -> None:
    for low, high in ((-1.0, 1.0), (0.0, 1.0)):
        spec = replace(PIXELS, data_range=(low, high))
        start = image_start(ImageRequest(IMAGES, None, 0.5), spec, 2, 2, None)
        assert start.first == 2 and start.clean.min() >= low and start.clean.max() <= high
        assert np.array_equal(to_uint8(start.clean, (low, high)), IMAGES)


def test_one_image_and_one_mask_serve_all_samples() -> None:
    start = image_start(ImageRequest(IMAGES[:1], MASKS[:1], 0.5, overlay=True), PIXELS, 0, 3, None)
    assert len(start) == 3 and start.mask is not None and start.mask.shape == (3, 1, 8, 8)
    assert np.array_equal(start.part(slice(2, 3)).clean, start.clean[:1])


def test_latents_have_the_mean_and_deviation_of_the_encoder_in_the_scale_of_the_denoiser() -> None:
    batches: list[int] = []

    def encode(images: np.ndarray) -> np.ndarray:
        batches.append(len(images))
        mean = np.repeat(images[:, :1, ::2, ::2], 4, axis=1)
        return np.concatenate([mean, np.full_like(mean, 2 * np.log(3.0))], axis=1)

    start = image_start(ImageRequest(IMAGES, None, 0.5), LATENTS, 0, 2, encode)
    pixels = IMAGES.transpose(0, 3, 1, 2)[:, :1, ::2, ::2] / 127.5 - 1
    np.testing.assert_allclose(start.clean, 0.5 * (np.repeat(pixels, 4, axis=1) - 0.25), atol=1e-6)
    assert start.std is not None and np.allclose(start.std, 1.5) and batches == [1, 1]
    # the encoder of a VQ model or of a tiny autoencoder gives the latent itself
    plain = image_start(ImageRequest(IMAGES, None, 0.5), LATENTS, 0, 2, lambda images: encode(images)[:, :4])
    assert plain.std is None and np.array_equal(plain.clean, start.clean)


def test_a_mask_is_sampled_at_the_cells_as_torch_interpolates_it() -> None:
    torch = pytest.importorskip("torch")
    start = image_start(
        ImageRequest(IMAGES, MASKS, 1.0), LATENTS, 0, 2, lambda images: images.repeat(2, 1)[..., :4, :4]
    )
    expected = torch.nn.functional.interpolate(torch.from_numpy(MASKS[:, None]).float(), size=(4, 4))
    assert start.mask is not None and np.array_equal(start.mask, expected.numpy())
    assert start.from_noise and start.pixels is None


def test_a_number_of_images_or_masks_that_does_not_match_is_refused() -> None:
    for images, masks, name in ((IMAGES, None, "image: 2"), (IMAGES[:1], MASKS, "mask: 2")):
        with pytest.raises(InvalidInputError, match=f"{name} given for 3 samples"):
            image_start(ImageRequest(images, masks, 0.5), PIXELS, 0, 3, None)


def bundle_of(spec: DenoiserSpec, sides: tuple[Any, ...] = (8, 8), encoder: bool = False) -> Bundle:
    graphs: dict[str, Any] = {"denoiser": {"inputs": {"sample": {"shape": ["batch", spec.sample_shape[0], *sides]}}}}
    if encoder:
        graphs["vae_encoder"] = {"inputs": {"sample": {"shape": ["batch", 3, "h", "w"]}}}
    return Bundle(Path("there"), spec, {"graphs": graphs})


def refused(request: ImageRequest, bundle: Bundle, *words: str, size: tuple[int, int] | None = None) -> None:
    with pytest.raises(InvalidInputError) as caught:
        sized(bundle, size, replace(request, prefix="--"))
    message = str(caught.value)
    assert message.startswith("--image: ") and "\n" not in message and all(w in message for w in words), message


def test_what_a_bundle_cannot_start_from_is_refused_in_one_line() -> None:
    request = ImageRequest(IMAGES, None, 0.5)
    any_size = ("height", "width")
    refused(request, bundle_of(LATENTS, any_size), "no vae_encoder", "--image-inputs")
    refused(request, bundle_of(replace(PIXELS, sample_shape=(2, 8))), "2x8 arrays")
    grey = ImageRequest(IMAGES[..., :1], None, 0.5)
    refused(grey, bundle_of(PIXELS), "1 channels (L)", "3 (RGB)")
    refused(grey, bundle_of(LATENTS, any_size, encoder=True), "1 channels (L)", "3 (RGB)")
    large = ImageRequest(IMAGES.repeat(2, axis=1), None, 0.5)
    refused(large, bundle_of(PIXELS), "16x8", "8x8 images only", "resize")
    odd = ImageRequest(IMAGES[:, :7], None, 0.5)
    refused(odd, bundle_of(LATENTS, any_size, encoder=True), "7x8", "multiples of 2", "8x8")
    refused(large, bundle_of(LATENTS, any_size, encoder=True), "16x8", "8x8", size=(8, 8))


def test_an_image_of_another_size_sets_the_size() -> None:
    large = ImageRequest(IMAGES.repeat(2, axis=1), None, 0.5)
    bundle = bundle_of(LATENTS, ("height", "width"), encoder=True)
    check_image(large, bundle)
    assert sized(bundle, None, large).sample_shape == sized(bundle, (16, 8), large).sample_shape == (4, 8, 4)
