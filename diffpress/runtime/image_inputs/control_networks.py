"""Control networks in the sampling loop: their residuals become inputs of the denoiser's controlled graph.

    residuals = sum over networks   scale_i(evaluation) * network_i(sample, timestep, text inputs, control image)
    output    = controlled(sample, timestep, text inputs, residuals)

In an evaluation in which every scale is 0 the plain denoiser runs, so that scale 0 gives exactly its samples. The two
halves of guidance read the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from diffpress.runtime.image_inputs.control import CONTROL_IMAGE, ControlRequest, control_pixels
from diffpress.runtime.network_inputs import SAMPLE, Network


class ControlNetwork(Protocol):
    """A control network: an engine, or a torch component."""

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """Inputs of the graph: name -> dtype."""

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the residuals of one batch by the names of the denoiser's inputs."""


@dataclass(frozen=True)
class Control:
    """Control of N samples by images.

    Attributes:
        controlled: The denoiser with residuals as inputs.
        networks: The control networks that have an image.
        images: The image of each network for every sample, float32 [N, C, H, W] in 0 .. 1.
        request: The request, whose images are those of `networks` in the same order.
    """

    controlled: Network
    networks: tuple[ControlNetwork, ...]
    images: tuple[np.ndarray, ...]
    request: ControlRequest

    def part(self, members: slice | np.ndarray) -> Control:
        """Return the control of these samples alone."""
        return replace(self, images=tuple(array[members] for array in self.images))

    def attached(self, plain: Network, evaluations: int) -> Network:
        """Return the denoiser under control, for one batch and that many evaluations."""
        return _Controlled(plain, self, [image.scales(evaluations) for image in self.request.given])


def make_control(
    request: ControlRequest,
    controlled: Network,
    networks: Sequence[ControlNetwork],
    channels: Sequence[int],
    count: int,
) -> Control:
    """Return the control of `count` samples.

    Args:
        request: The images.
        controlled: The denoiser with residuals as inputs.
        networks: The control networks that have an image in the request.
        channels: Channels of the images that each of them reads.
        count: Number of samples.

    Raises:
        InvalidInputError: There are neither one nor `count` images for a network.
    """
    name = request.option(CONTROL_IMAGE)
    pairs = zip(request.given, channels, strict=True)
    images = tuple(control_pixels(image, number, count, name) for image, number in pairs)
    return Control(controlled, tuple(networks), images, request)


class _Controlled:
    """A denoiser under control, for the evaluations of one batch in their order."""

    def __init__(self, plain: Network, control: Control, scales: Sequence[Sequence[float]]) -> None:
        self._plain, self._control = plain, control
        self._scales = iter(list(zip(*scales, strict=True)))
        self.inputs = plain.inputs

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the output of the next evaluation."""
        control, residuals = self._control, dict[str, np.ndarray]()
        for network, images, scale in zip(control.networks, control.images, next(self._scales), strict=True):
            if scale != 0.0:
                for name, array in network.run_all(_feed(network, inputs, images)).items():
                    scaled = array * np.float32(scale)
                    residuals[name] = residuals[name] + scaled if name in residuals else scaled
        if not residuals:
            return self._plain.run(inputs)
        return control.controlled.run({**inputs, **residuals})


def _feed(network: ControlNetwork, inputs: Mapping[str, np.ndarray], images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs of a control network for those of a denoiser, which may have both halves of guidance."""
    halves = len(inputs[SAMPLE]) // len(images)
    given = {**inputs, CONTROL_IMAGE: np.concatenate([images] * halves)}
    return {name: given[name].astype(dtype, copy=False) for name, dtype in network.inputs.items()}
