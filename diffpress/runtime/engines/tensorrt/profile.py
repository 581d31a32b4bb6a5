"""Optimization profile of an engine: smallest, usual and largest shape of every input, from the graph and the spec.

    batch, steps                     from the build options; always 1 in an autoencoder
    height, width                    of the sample: the spec's, or from the smallest to the largest requested size
    latent_height, latent_width      the same, in a decoder
    image_height, image_width        the same in pixels, in an encoder
    height // 2, width // 8 ...      a part of the sample's: residuals of a control network
    sequence                         padded length of the spec's text inputs and encoders

These are the names of the graph's dynamic dimensions; all other dimensions must be fixed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec

Range = tuple[int, int, int]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
Dimensions = Mapping[str, Sequence[int | str]]

HEIGHT, WIDTH = ("height", "latent_height"), ("width", "latent_width")
IMAGE = ("image_height", "image_width")
AUTOENCODER = ("vae_decoder", "vae_encoder")


def profile_shapes(inputs: Dimensions, spec: DenoiserSpec, options: BuildOptions, graph: str = "denoiser") -> Shapes:
    """Return the smallest, usual and largest shape of each input of a graph.

    Args:
        inputs: Input name -> dimensions, an int or the name of a dynamic dimension each.
        spec: Spec of the denoiser.
        options: Build options with batch and image sizes.
        graph: Name of the graph in the bundle.

    Raises:
        InvalidInputError: A dimension has an unknown name, or the model does not support the sizes.
    """
    names = {dim for shape in inputs.values() for dim in shape if isinstance(dim, str)}
    if options.sizes is not None and graph == "denoiser" and not names & {*HEIGHT, *WIDTH}:
        raise InvalidInputError(
            "sizes: this graph has a fixed height and width; export without --size, or omit --sizes"
        )
    found = {}
    for name, shape in inputs.items():
        ranges = [_range(dim, name, spec, options, graph) for dim in shape]
        low, usual, high = (tuple(entry[i] for entry in ranges) for i in range(3))
        found[name] = (low, usual, high)
    return found


def _range(dim: int | str, name: str, spec: DenoiserSpec, options: BuildOptions, graph: str) -> Range:
    if isinstance(dim, int):
        return dim, dim, dim
    if dim in ("batch", "steps"):
        # the pipeline encodes and decodes one sample at a time, since an autoencoder's memory grows with the batch
        return (1, 1, 1) if graph in AUTOENCODER else options.batch
    if dim in HEIGHT:
        return _side(0, spec, options)
    if dim in WIDTH:
        return _side(1, spec, options)
    if dim in IMAGE:
        low, usual, high = (side * spec.latent_factor for side in _side(IMAGE.index(dim), spec, options))
        return low, usual, high
    part = re.fullmatch(r"(height|width) // (\d+)", dim)
    if part is not None:
        low, usual, high = (side // int(part[2]) for side in _range(part[1], name, spec, options, graph))
        return low, usual, high
    if dim == "sequence":
        length = _length(name, spec, graph)
        return length, length, length
    raise InvalidInputError(f"{graph}: the dimension '{dim}' of input '{name}' is unknown; export the bundle again")


def _side(axis: int, spec: DenoiserSpec, options: BuildOptions) -> Range:
    """Range of the height (axis 0) or width (axis 1) of the sample, in elements."""
    default = spec.sample_shape[1 + axis]
    if options.sizes is None:
        return default, default, default
    unit = spec.latent_factor * spec.size_multiple
    low, high = options.sizes[0][axis], options.sizes[1][axis]
    if low % unit or high % unit:
        raise InvalidInputError(f"sizes: {low} and {high} must be multiples of {unit} for this model")
    low, high = low // spec.latent_factor, high // spec.latent_factor
    return low, min(max(default, low), high), high


def _length(name: str, spec: DenoiserSpec, graph: str) -> int:
    if name in spec.conditioning.inputs:
        return spec.conditioning.inputs[name].shape[0]
    for encoder in spec.conditioning.encoders:
        if encoder.graph == graph:
            return encoder.length
    raise InvalidInputError(f"{graph}: the length of input '{name}' is not in the spec; export the bundle again")
