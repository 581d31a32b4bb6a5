"""Checkpoint -> float ONNX graph, from which all other graphs are derived.

    sample [B, C, H, W] f32, timestep [B] i64 or f32, class_labels [B] i64, text inputs [B, ...] f32, guidance [B] f32
        ->   out_sample [B, C, H, W] f32

Only inputs that the model accepts are present. B is dynamic; H, W and the text length are dynamic if the model allows
it. `diffpress.export.graph.trace` describes the tracing and the node names.
"""

from __future__ import annotations

from pathlib import Path

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import adapter_for, dummy_inputs, dynamic_axes
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.graph.trace import trace

OUT = "out_sample"

# torch.export would specialize the graph to a batch size of 1
TRACED_BATCH = 2


def export_float(checkpoint: Checkpoint, path: Path) -> Graph:
    """Write the checkpoint's network in float32 to `path` (and `path`.data above 2 GiB); return the graph.

    The same checkpoint gives the same bytes in any process.

    Raises:
        InvalidInputError: If the module cannot be traced.
    """
    graph = to_onnx(checkpoint)
    save_graph(graph, path)
    return graph


def to_onnx(checkpoint: Checkpoint, fixed_size: bool = False) -> Graph:
    """Return the checkpoint's network as a float32 ONNX graph whose weights read the checkpoint's tensors.

    `fixed_size` fixes height and width to the spec's, even if the model supports other sizes.
    """
    inputs = dummy_inputs(checkpoint.spec, TRACED_BATCH)
    axes = dynamic_axes(checkpoint.model, checkpoint.spec, fixed_size)
    return trace(checkpoint.model, adapter_for(checkpoint.model).forward, inputs, [OUT], axes)
