"""Sizes of the image other than the model's own: the spec for one, and which ones a bundle's graph can make."""

from __future__ import annotations

from dataclasses import replace

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.control import CONTROL_IMAGE, ControlRequest, check_control, check_control_size
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


def sized(
    bundle: Bundle,
    size: tuple[int, int] | None,
    image: ImageRequest | None = None,
    control: ControlRequest | None = None,
) -> DenoiserSpec:
    """Return the bundle's spec for a size, or else for that of an image to start from, or of control images.

    Raises:
        InvalidInputError: The model cannot make the size, or it cannot use the images.
    """
    check_image(image, bundle)
    check_control(control, bundle)
    spec = _sized(bundle, size, image, control)
    if control is not None:
        check_control_size(control, spec)
    return spec


def _sized(
    bundle: Bundle, size: tuple[int, int] | None, image: ImageRequest | None, control: ControlRequest | None
) -> DenoiserSpec:
    if image is not None and size is not None and tuple(size) != image.size:
        raise InvalidInputError(
            f"{image.prefix}image: is {size_text(image.size)}, but size is {size_text(size)} (height x width); "
            "resize the image"
        )
    wanted, named = (size, "") if image is None else (image.size, f"{image.prefix}image")
    if wanted is None and control is not None:
        wanted, named = control.size, control.option(CONTROL_IMAGE)
    if wanted is None:
        return bundle.spec
    try:
        return resized(bundle.spec, wanted, has_fixed_size(bundle))
    except InvalidInputError as error:
        if not named:
            raise
        raise InvalidInputError(f"{named}: {error}; resize the image") from error


def has_fixed_size(bundle: Bundle) -> bool:
    """Return whether the denoiser's graph was made for one height and width, or does not say for which."""
    sample = bundle.manifest["graphs"]["denoiser"].get("inputs", {}).get("sample", {})
    return all(isinstance(side, int) for side in sample.get("shape", ())[2:])
