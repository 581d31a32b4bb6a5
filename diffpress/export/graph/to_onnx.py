"""Checkpoint -> float ONNX graph, the portable truth that everything else is made from.

    sample [B, C, H, W] f32, timestep [B] i64 or f32, class_labels [B] i64, text inputs [B, ...] f32, guidance [B] f32
        ->   out_sample [B, C, H, W] f32

with those of the inputs that the model takes. B is dynamic, and H, W and the text's length where the model allows.
`diffpress.export.graph.trace` says how it is made and what names it keeps.
"""

from __future__ import annotations

from pathlib import Path

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import adapter_for, dummy_inputs, dynamic_axes
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.graph.trace import trace

OUT = "out_sample"

# torch.export would fix a batch of one in the graph
TRACED_BATCH = 2


def export_float(checkpoint: Checkpoint, path: Path) -> Graph:
    """Write the checkpoint's network in float32 to `path` (and `path`.data above 2 GiB); returns the graph.

    The same checkpoint gives the same bytes in any process. Raises InvalidInputError where the module cannot be traced.
    """
    graph = to_onnx(checkpoint)
    save_graph(graph, path)
    return graph


def to_onnx(checkpoint: Checkpoint, fixed_size: bool = False) -> Graph:
    """The checkpoint's network as an ONNX graph whose weights read the checkpoint's (see the top of this file).

    `fixed_size` keeps height and width as the spec has them also where the model would allow others.
    """
    inputs = dummy_inputs(checkpoint.spec, TRACED_BATCH)
    axes = dynamic_axes(checkpoint.model, checkpoint.spec, fixed_size)
    return trace(checkpoint.model, adapter_for(checkpoint.model).forward, inputs, [OUT], axes)
