"""A bundle's graphs and its spec -> one graph from noise and conditioning to images.

    noise * initial std -> Loop over the plan -> clip -> latent / scale + shift -> decoder -> images in [0, 1]

The size of the image is that of the spec: guidance inputs, time shifts and text inputs may depend on it. The number of
images is free.
"""

from __future__ import annotations

import numpy as np

from diffpress.export.graph.model import Graph
from diffpress.export.graph.opsets import opset_of, with_min_opset
from diffpress.export.graph.read import read_graph
from diffpress.export.targets.sampler.block import BATCH, Block, dtypes_of, value_info
from diffpress.export.targets.sampler.conditioning import IMAGES, NOISE, Inputs, add_conditioning
from diffpress.export.targets.sampler.evaluation import Denoiser
from diffpress.export.targets.sampler.plan_loop import add_loop
from diffpress.export.targets.sampler.supported import checked_program
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.outputs import DECODER, has_decoder, makes_pictures, output_shape
from diffpress.runtime.sampler import initial_std
from diffpress.runtime.sampling_plan import plan_steps
from diffpress.runtime.spec import DenoiserSpec

ENGINE = "onnxruntime"  # the sampler contains the graphs that this engine runs


def build_sampler(bundle: Bundle) -> Graph:
    """Return the sampler graph of a bundle, whose weights are read when it is written.

    Inputs are `noise`, float32 [N, C, H, W], and those of `conditioning`; the output is `images`, float32 [N, height,
    width, channels] in 0..1.

    Raises:
        InvalidInputError: The plan, the conditioning or the samples cannot be expressed in one graph.
    """
    spec = bundle.spec_for(ENGINE)
    check_pictures(bundle)
    program = checked_program(spec)
    encoders = [encoder.graph for encoder in spec.conditioning.encoders]
    names = ["denoiser", *encoders, *([DECODER] if has_decoder(bundle) else [])]
    graphs = _at_one_opset({name: read_graph(bundle.graph(name, ENGINE)) for name in names})

    block = Block()
    inputs = Inputs(block, guided=program.halves == 2, count=block.op("Shape", NOISE, start=0, end=1))
    inputs.add(NOISE, "float32", BATCH, *spec.sample_shape)
    network = graphs["denoiser"]
    types = dtypes_of(network.proto.graph.input)
    static, guidance = add_conditioning(inputs, spec.conditioning, types, graphs, spec.image_size)
    first, _ = plan_steps(spec.schedule, spec.plan)[0]
    start = block.op("Mul", NOISE, block.constant(initial_std(first, spec.plan.start)))
    denoiser = Denoiser(network, static, inputs.rows, guidance)
    sample = add_loop(block, denoiser, program, start, spec.sample_shape)
    if program.bounds is not None:
        sample = block.op("Clip", sample, *(block.constant(bound) for bound in program.bounds))
    _add_images(block, spec, sample, graphs.get(DECODER))
    channels, *sides = output_shape(bundle, spec)
    return block.graph("sampler", inputs.values, [value_info(IMAGES, np.float32, (BATCH, *sides, channels))])


def check_pictures(bundle: Bundle) -> None:
    """Raise InvalidInputError if a bundle's samples are not pictures."""
    if not makes_pictures(bundle):
        shape = "x".join(map(str, output_shape(bundle)))
        decoder = "" if has_decoder(bundle) or not bundle.is_latent else "; export the whole pipeline with its decoder"
        raise InvalidInputError(f"target sampler: samples of shape {shape} are not pictures{decoder}")


def _add_images(block: Block, spec: DenoiserSpec, sample: str, decoder: Graph | None) -> None:
    """Add the decoder, if there is one, and the conversion to 0..1 with the channels last."""
    image = sample
    if decoder is not None:
        scaled = block.op("Div", sample, block.constant(spec.latent_scale))
        latent = block.op("Add", scaled, block.constant(spec.latent_shift))
        ((name, dtype),) = dtypes_of(decoder.proto.graph.input).items()
        decoded = block.network(decoder, DECODER, {name: block.cast(latent, dtype, np.float32)})[0]
        outputs = decoder.proto.graph.output
        image = block.cast(decoded, np.float32, dtypes_of(outputs)[outputs[0].name])
    low, high = spec.data_range
    unit = block.op("Div", block.op("Sub", image, block.constant(low)), block.constant(high - low))
    clipped = block.op("Clip", unit, block.constant(0.0), block.constant(1.0))
    block.named(IMAGES, block.op("Transpose", clipped, perm=[0, 2, 3, 1]))


def _at_one_opset(graphs: dict[str, Graph]) -> dict[str, Graph]:
    opset = max(map(opset_of, graphs.values()))
    return {name: with_min_opset(graph, opset) for name, graph in graphs.items()}
