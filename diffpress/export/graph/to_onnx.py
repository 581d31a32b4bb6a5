"""Torch denoiser -> float ONNX graph, from which all other graphs are derived.

    sample [B, C, H, W] f32, timestep [B] i64 or f32, class_labels [B] i64, text inputs [B, ...] f32, guidance [B] f32
        ->   out_sample [B, C, H, W] f32, and the features [B, ...] f32 of a plan with cached steps

Only inputs that the model accepts are present. B is dynamic; H, W and the text length are dynamic if the model allows
it. `diffpress.export.graph.trace` describes the tracing and the node names.
"""

from __future__ import annotations

from torch import nn

from diffpress.compress.models.adapter import adapter_for, cut_of, dummy_inputs, dynamic_axes
from diffpress.compress.models.feature_cuts import split_forward
from diffpress.export.graph.model import Graph
from diffpress.export.graph.trace import trace
from diffpress.runtime.spec import DenoiserSpec

OUT = "out_sample"

# torch.export would specialize the graph to a batch size of 1
TRACED_BATCH = 2


def to_onnx(model: nn.Module, spec: DenoiserSpec, fixed_size: bool = False) -> Graph:
    """Return the network as a float32 ONNX graph whose weights read the model's tensors.

    `fixed_size` fixes height and width to the spec's, even if the model supports other sizes. The same model gives the
    same graph in any process.

    Raises:
        InvalidInputError: If the module cannot be traced.
    """
    inputs = dummy_inputs(spec, TRACED_BATCH)
    axes = dynamic_axes(model, spec, fixed_size)
    forward, cache = adapter_for(model).forward, spec.plan.cache
    if cache is None or cache.kind != "features":
        return trace(model, forward, inputs, [OUT], axes)
    cut = cut_of(model, cache.cut)
    return trace(model, lambda m, feed: split_forward(m, forward, cut, feed), inputs, [OUT, *cut.features], axes)
