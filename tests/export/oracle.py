"""Reference for graph tests: execution of nodes without optimization, and scales measured on one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.config import ExportConfig
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.quantization.calibration.weight_scales import weight_amax
from diffpress.compress.quantization.formats import FORMATS, INT8
from diffpress.compress.quantization.layer_graph import trace_layer_graph
from diffpress.compress.quantization.unified_scales import unify_scales
from diffpress.export.bundle import export_bundle
from diffpress.export.denoiser import lower_denoiser
from diffpress.export.graph.model import Graph, Weight, load_all
from diffpress.export.lowering import PassContext, lower
from diffpress.export.verify.latency import Latency
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines.tensorrt.options import BuildOptions

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
Layer = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear | nn.Embedding
)  # whose weight can have a scale


def run_exactly(graph: Graph | onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the first output in ONNX Runtime without optimization: Q and DQ run as written, in float."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    model = (load_all(graph) if isinstance(graph, Graph) else graph).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def inputs_for(checkpoint: Checkpoint, batch: int = 4) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in dummy_inputs(checkpoint.spec, batch, seed=5).items()}


def measured_scales(
    checkpoint: Checkpoint,
    *,
    kind: str = "int8",
    formats: Mapping[str, str] | None = None,
    weight_only: tuple[str, ...] = (),
    outputs: bool = False,
    residual_outputs: bool = False,
    weight_range: float = 1.0,
) -> Quantization:
    """Return the largest magnitudes over one batch of example inputs; embeddings by row.

    `formats` maps layers to formats, by default all layers to `kind`. Weights are multiplied by `weight_range`.
    `outputs` adds the outputs of integer layers; `residual_outputs` adds residual sums, with unified scales.
    """
    amax: dict[str, torch.Tensor] = {}
    hooks = []
    formats = {name: kind for name, _ in layers_of(checkpoint.model)} if formats is None else formats
    for name, layer in layers_of(checkpoint.model):
        if name not in formats:
            continue
        weight, number = layer.weight.detach(), FORMATS[formats[name]].activations
        by_row = weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight
        amax[f"{name}.weight"] = weight_amax(by_row, FORMATS[formats[name]]) * weight_range
        if number is None or isinstance(layer, nn.Embedding) or name in weight_only:
            continue
        rounds = outputs and number is INT8

        def remember(
            layer: nn.Module, args: tuple[Any, ...], out: torch.Tensor, name: str = name, rounds: bool = rounds
        ) -> None:
            _grow(amax, f"{name}.input", args[0])
            if rounds and (isinstance(layer, CONVOLUTIONS) or args[0].dim() == 3):
                _grow(amax, f"{name}.output", out)

        hooks.append(layer.register_forward_hook(remember))
    for name in adapter_for(checkpoint.model).residual_outputs(checkpoint.model) if residual_outputs else []:

        def remember_sum(block: nn.Module, args: tuple[Any, ...], out: torch.Tensor, name: str = name) -> None:
            _grow(amax, f"{name}.output", out)

        hooks.append(checkpoint.model.get_submodule(name).register_forward_hook(remember_sum))
    with torch.no_grad():
        adapter_for(checkpoint.model).forward(checkpoint.model, dummy_inputs(checkpoint.spec, 8))
    for hook in hooks:
        hook.remove()
    others = {name: own for name, own in formats.items() if own != kind}
    if residual_outputs:
        amax = dict(unify_scales(trace_layer_graph(checkpoint.model, checkpoint.spec), amax))
    return Quantization(kind, amax, others)


def quantized_graph(graph: Graph, quantization: Quantization, tensorrt: bool = False) -> Graph:
    """Return a float graph with Q/DQ, as it is lowered for engines on the CPU or for TensorRT."""
    return lower(graph, "tensorrt" if tensorrt else "cpu", PassContext(quantization))


def exported(
    checkpoint: Checkpoint,
    folder: Path,
    targets: Sequence[str] = ("onnx",),
    *,
    float_graph: Graph | None = None,
    metrics: dict[str, Any] | None = None,
    latencies: Sequence[Latency] = (),
    reuse: Bundle | None = None,
    capabilities: Sequence[str] = (),
    build: BuildOptions | None = None,
    parity_sqnr_db: float | None = None,
    **settings: Any,
) -> Bundle:
    """Export a checkpoint whose graph may be traced already; nothing is timed."""
    tensorrt = {"compute_capabilities": capabilities, **(build or BuildOptions()).to_json()}
    config = ExportConfig.model_validate({"targets": targets, "tensorrt": tensorrt, **settings})
    denoiser = None if float_graph is None else lower_denoiser(checkpoint, config, float_graph)
    return export_bundle(
        checkpoint,
        folder,
        config,
        metrics=metrics,
        denoiser=denoiser,
        latencies=latencies,
        reuse=reuse,
        parity_sqnr_db=parity_sqnr_db,
    )


def with_recorded_reads(graph: Graph, reads: list[str]) -> Graph:
    """Return the same graph, which appends a weight's name to `reads` each time that the weight is read."""

    def recorded(name: str, weight: Weight) -> Weight:
        def read() -> np.ndarray:
            reads.append(name)
            return weight.read()

        return weight._replace(read=read)

    return Graph(graph.proto, {name: recorded(name, weight) for name, weight in graph.weights.items()})


def layers_of(model: nn.Module) -> list[tuple[str, Layer]]:
    """Return the layers, by name, whose weight can have a scale."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Layer)]


def _grow(amax: dict[str, torch.Tensor], key: str, x: torch.Tensor) -> None:
    largest = x.detach().abs().max()
    amax[key] = torch.maximum(amax[key], largest) if key in amax else largest
