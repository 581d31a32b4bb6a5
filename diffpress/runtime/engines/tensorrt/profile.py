"""The shapes that a plan shall take: for every input the least, the usual and the largest, by the graph and the spec.

    batch, steps                     as the build options have them; one at a time in a decoder of latents
    height, width                    of the sample: the spec's own, or from the smallest to the largest size asked for
    latent_height, latent_width      the same, in a decoder
    sequence                         what the spec's text inputs and encoders are padded to

The names are those that the graph's dimensions have; anything else in a graph must be a fixed number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec

Range = tuple[int, int, int]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
Dimensions = Mapping[str, Sequence[int | str]]

HEIGHT, WIDTH = ("height", "latent_height"), ("width", "latent_width")


def profile_shapes(inputs: Dimensions, spec: DenoiserSpec, options: BuildOptions, graph: str = "denoiser") -> Shapes:
    """Input -> (least, usual, largest shape) for a graph of a bundle, whose `inputs` have numbers and names as shape.

    Raises InvalidInputError for a dimension without a meaning, and for sizes that the model or its graph cannot take.
    """
    names = {dim for shape in inputs.values() for dim in shape if isinstance(dim, str)}
    if options.sizes is not None and graph == "denoiser" and not names & {*HEIGHT, *WIDTH}:
        raise InvalidInputError(
            "sizes: this graph takes one height and width; export without --size, or leave the sizes out"
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
        # the pipeline decodes latents one by one: a decoder's memory grows with the batch
        return (1, 1, 1) if graph == "vae_decoder" else options.batch
    if dim in HEIGHT:
        return _side(0, spec, options)
    if dim in WIDTH:
        return _side(1, spec, options)
    if dim == "sequence":
        length = _length(name, spec, graph)
        return length, length, length
    raise InvalidInputError(f"{graph}: the dimension '{dim}' of input '{name}' has no range; export the bundle again")


def _side(axis: int, spec: DenoiserSpec, options: BuildOptions) -> Range:
    """Height (axis 0) or width in cells of the sample."""
    own = spec.sample_shape[1 + axis]
    if options.sizes is None:
        return own, own, own
    unit = spec.latent_factor * spec.size_multiple
    low, high = options.sizes[0][axis], options.sizes[1][axis]
    if low % unit or high % unit:
        raise InvalidInputError(f"sizes: {low} and {high} must be multiples of {unit} for this model")
    low, high = low // spec.latent_factor, high // spec.latent_factor
    return low, min(max(own, low), high), high


def _length(name: str, spec: DenoiserSpec, graph: str) -> int:
    if name in spec.conditioning.inputs:
        return spec.conditioning.inputs[name].shape[0]
    for encoder in spec.conditioning.encoders:
        if encoder.graph == graph:
            return encoder.length
    raise InvalidInputError(f"{graph}: the length of input '{name}' is not in the spec; export the bundle again")
