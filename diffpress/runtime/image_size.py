"""Sizes of the image other than the model's own: the spec for one, and which ones a bundle's graph can make."""

from __future__ import annotations

from dataclasses import replace

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.encode import check_image
from diffpress.runtime.image_inputs.request import ImageRequest, size_text
from diffpress.runtime.requested_plan import warn_of_lost_cache
from diffpress.runtime.spaced_timesteps import reshifted
from diffpress.runtime.spec import DenoiserSpec


def resized(spec: DenoiserSpec, size: tuple[int, int], fixed: bool = False) -> DenoiserSpec:
    """Return the spec for images of `size` (height, width) in pixels, with its plan shifted for that size.

    `fixed` means that the graph was made for one size. Raises InvalidInputError for a size the model cannot make.
    """
    factor, unit = spec.latent_factor, spec.latent_factor * spec.size_multiple
    if size == spec.image_size:
        return spec
    if fixed:
        raise InvalidInputError(
            f"size {size_text(size)}: this bundle's graph makes {size_text(spec.image_size)} images only"
        )
    if min(size) < unit or size[0] % unit or size[1] % unit:
        near = size_text(tuple(max(unit, round(side / unit) * unit) for side in size))
        raise InvalidInputError(
            f"size {size_text(size)}: sides must be multiples of {unit} for this model; the nearest is {near}"
        )
    shape = (spec.sample_shape[0], size[0] // factor, size[1] // factor)
    own, *others = (
        reshifted(timesteps, spec.spacing, spec.tokens(spec.sample_shape), spec.tokens(shape), spec.schedule)
        for timesteps in (spec.plan.timesteps, *spec.distilled_timesteps)
    )
    plan = spec.plan.over(own)
    warn_of_lost_cache(spec, plan)
    return replace(spec, sample_shape=shape, plan=plan, distilled_timesteps=tuple(others))


def sized(bundle: Bundle, size: tuple[int, int] | None, image: ImageRequest | None = None) -> DenoiserSpec:
    """Return the bundle's spec for a size, or for that of an image to start from.

    Raises:
        InvalidInputError: The model cannot make the size, or it cannot start from the image.
    """
    check_image(image, bundle)
    if image is not None and size is not None and tuple(size) != image.size:
        raise InvalidInputError(
            f"{image.prefix}image: is {size_text(image.size)}, but size is {size_text(size)} (height x width); "
            "resize the image"
        )
    wanted = size if image is None else image.size
    if wanted is None:
        return bundle.spec
    try:
        return resized(bundle.spec, wanted, has_fixed_size(bundle))
    except InvalidInputError as error:
        if image is None:
            raise
        raise InvalidInputError(f"{image.prefix}image: {error}; resize the image") from error


def has_fixed_size(bundle: Bundle) -> bool:
    """Return whether the denoiser's graph was made for one height and width, or does not say for which."""
    sample = bundle.manifest["graphs"]["denoiser"].get("inputs", {}).get("sample", {})
    return all(isinstance(side, int) for side in sample.get("shape", ())[2:])
