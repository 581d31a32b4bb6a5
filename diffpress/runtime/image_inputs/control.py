"""Control images: what a user gives to ControlNets and T2I-Adapters, read and checked before anything is opened.

control_image     a file, a PIL image, or uint8 [H, W] or [H, W, C]; a list or [N, H, W, C] for one image per sample;
                  for a bundle with several control networks a list with one of these, or None, for each
scale             what the residuals of the network are multiplied by; 0 leaves it out
start, end        shares of the evaluations between which the network is used, as in diffusers
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.request import read_images, size_text
from diffpress.runtime.requested_plan import warn_of_lost_cache
from diffpress.runtime.spec import DenoiserSpec

CONTROL_IMAGE = "control_image"  # input of a control network
DOWN_RESIDUAL, MID_RESIDUAL = "down_block_residual_", "mid_block_residual"  # outputs, and inputs of the denoiser


@dataclass(frozen=True)
class ControlImage:
    """Image of one control network, and how strongly and when it controls.

    Attributes:
        pixels: uint8 [M, H, W, C]; M is 1 for all samples, or one for each.
        scale: Factor of the network's residuals.
        start: Share of the evaluations after which it begins, 0 <= start < end.
        end: Share of the evaluations after which it stops, at most 1.
    """

    pixels: np.ndarray
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def scales(self, evaluations: int) -> list[float]:
        """Return the scale in each evaluation: 0 outside of start and end, by the rule of diffusers' pipelines."""
        steps = [(index / evaluations, (index + 1) / evaluations) for index in range(evaluations)]
        return [0.0 if first < self.start or last > self.end else self.scale for first, last in steps]


@dataclass(frozen=True)
class ControlRequest:
    """Control images in the order of the bundle's control networks; None leaves a network out.

    `prefix` is what stands before the name of an argument in messages: "--" on the command line.
    """

    images: tuple[ControlImage | None, ...]
    prefix: str = ""

    @property
    def given(self) -> list[ControlImage]:
        """The images that there are."""
        return [image for image in self.images if image is not None]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.given[0].pixels.shape[1:3]
        return int(height), int(width)

    @property
    def rows(self) -> list[int]:
        """Number of images for each network that has one for every sample."""
        return [len(image.pixels) for image in self.given if len(image.pixels) > 1]

    def facts(self) -> dict[str, str | None]:
        """Return what identifies the request, for the record of a sample."""
        found = []
        for index, image in enumerate(self.images):
            if image is not None:
                digest = hashlib.sha256(image.pixels.tobytes()).hexdigest()
                found.append(f"{index}: {digest} scale {image.scale:g} from {image.start:g} to {image.end:g}")
        return {"control": ", ".join(found)}

    def option(self, name: str) -> str:
        """Return what an option is called in messages: 'control_image', '--control-image'."""
        return f"{self.prefix}{name.replace('_', '-')}" if self.prefix else name


def residual_names(down: int) -> list[str]:
    """Return the names of the residuals of a ControlNet with that many of down blocks, the middle's last."""
    return [*(f"{DOWN_RESIDUAL}{index}" for index in range(down)), MID_RESIDUAL]


def by_network(control_image: Any, networks: int) -> list[Any]:
    """Return one entry for each control network from the `control_image` of a call."""
    if control_image is None:
        return []
    several = networks > 1 and isinstance(control_image, Sequence) and not isinstance(control_image, str)
    return list(control_image) if several else [control_image]


def read_control_request(
    images: Sequence[Any],
    scale: float | Sequence[float] | None = None,
    start: float | Sequence[float] | None = None,
    end: float | Sequence[float] | None = None,
    prefix: str = "",
) -> ControlRequest | None:
    """Read and check the images, one entry for each control network; None if there are none.

    Args:
        images: What a user gives for each network, in the order of the bundle; None leaves a network out.
        scale: Factor of the residuals: one for all networks, or one for each; None is 1.
        start: See ControlImage; None is 0.
        end: See ControlImage; None is 1.
        prefix: See ControlRequest.

    Raises:
        InvalidInputError: A file cannot be read, sizes differ, or a number is out of range or has no image.
    """
    named = ControlRequest((), prefix).option
    numbers = {"control_scale": scale, "control_start": start, "control_end": end}
    if not any(image is not None for image in images):
        for name, value in numbers.items():
            if value is not None:
                raise InvalidInputError(f"{named(name)}: needs an image; give one with {named('control_image')}")
        return None
    count, label = len(images), named("control_image")
    defaults = {"control_scale": 1.0, "control_start": 0.0, "control_end": 1.0}
    values = [_each(numbers[name], defaults[name], count, named(name)) for name in numbers]
    found: list[ControlImage | None] = []
    for image, factor, first, last in zip(images, *values, strict=True):
        if not (0.0 <= first < last <= 1.0):  # false for NaN as well
            raise InvalidInputError(
                f"{named('control_start')} {first:g}, {named('control_end')} {last:g}: the start must be at least 0 "
                "and below the end, and the end at most 1"
            )
        found.append(None if image is None else ControlImage(read_images(image, label), factor, first, last))
    sizes = sorted({image.pixels.shape[1:3] for image in found if image is not None})
    if len(sizes) > 1:
        raise InvalidInputError(f"{label}: give images of one size, found {' and '.join(map(size_text, sizes))}")
    return ControlRequest(tuple(found), prefix)


def _each(value: float | Sequence[float] | None, default: float, count: int, name: str) -> list[float]:
    """Return one finite number for each of `count` images."""
    given = [default] if value is None else [value] if isinstance(value, int | float) else list(value)
    if len(given) not in (1, count):
        raise InvalidInputError(f"{name}: {len(given)} given for {count} control images; give one for each, or one")
    for number in given:
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise InvalidInputError(f"{name} {number}: must be a finite number")
    return [float(number) for number in given] * (count if len(given) == 1 else 1)


def check_control(request: ControlRequest | None, bundle: Bundle) -> None:
    """Check that a bundle has a control network for every image of a request.

    Raises:
        InvalidInputError: It has none, too few, or one that reads other channels.
    """
    if request is None:
        return
    name, networks = request.option("control_image"), bundle.control_networks
    if not networks:
        raise InvalidInputError(
            f"{name}: {bundle.path} has no control network; export it again with --controlnet, or leave the image out"
        )
    if len(request.images) > len(networks):
        raise InvalidInputError(
            f"{name}: {len(request.images)} images for {len(networks)} control networks ({', '.join(networks)}); give "
            "one for each, in this order"
        )
    for network, image in zip(networks, request.images, strict=False):
        channels = bundle.manifest["graphs"][network]["inputs"][CONTROL_IMAGE]["shape"][1]
        if image is not None and image.pixels.shape[3] not in (1, channels):
            raise InvalidInputError(
                f"{name}: has {image.pixels.shape[3]} channels, {network} reads {channels}; convert it"
            )


def check_control_size(request: ControlRequest, spec: DenoiserSpec) -> None:
    """Raise InvalidInputError if the images do not have the size of the result."""
    if request.size != spec.image_size:
        raise InvalidInputError(
            f"{request.option('control_image')}: is {size_text(request.size)}, the result is "
            f"{size_text(spec.image_size)} (height x width); resize it"
        )


def controlled_spec(spec: DenoiserSpec) -> DenoiserSpec:
    """Return the spec without a step cache, which was measured without control; a warning says so."""
    plan = spec.plan.without_cache
    warn_of_lost_cache(spec, plan)
    return spec.with_plan(plan)


def control_pixels(image: ControlImage, channels: int, count: int, name: str) -> np.ndarray:
    """Return the images of `count` samples, float32 [count, C, H, W] in 0 .. 1, without a copy for each.

    An image of one channel is repeated, as diffusers converts grey images to RGB.

    Raises:
        InvalidInputError: The number of images is neither 1 nor `count`.
    """
    if len(image.pixels) not in (1, count):
        raise InvalidInputError(
            f"{name}: {len(image.pixels)} given for {count} samples; give one for each, or one for all"
        )
    unit = image.pixels.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255.0)
    if unit.shape[1] != channels:
        unit = np.repeat(unit, channels, axis=1)
    return np.broadcast_to(unit, (count, *unit.shape[1:]))
