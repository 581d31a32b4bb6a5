"""What a bundle's samples are after decoding: their shape, and whether they are pictures. No engine is opened."""

from __future__ import annotations

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.spec import DenoiserSpec, is_picture

DECODER = "vae_decoder"


def has_decoder(bundle: Bundle) -> bool:
    """Return whether samples are latents that a decoder of the bundle turns into images."""
    return bundle.is_latent and DECODER in bundle.manifest["graphs"]


def output_shape(bundle: Bundle, spec: DenoiserSpec | None = None) -> tuple[int, ...]:
    """Return the shape of one sample after decoding, [C, H, W] for images.

    `spec` is the bundle's own, which is the default, or one with another plan or size.
    """
    spec = spec or bundle.spec
    if not has_decoder(bundle):
        return spec.sample_shape
    outputs = bundle.manifest["graphs"][DECODER].get("outputs", {})
    shape = next((tuple(output["shape"][1:]) for output in outputs.values()), (3, "height", "width"))
    return shape if all(isinstance(side, int) for side in shape) else (shape[0], *spec.image_size)


def makes_pictures(bundle: Bundle) -> bool:
    """Return whether the samples can be shown: [C, H, W] with 1, 3 or 4 channels, and no undecoded latents."""
    return is_picture(output_shape(bundle)) and (has_decoder(bundle) or bundle.spec.is_pixel_space)
