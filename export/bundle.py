"""Checkpoint -> bundle: graph, proof, engines, manifest, in a temporary folder that is renamed when it is whole.

    denoiser.onnx (+ .data)   float, or int8 Q/DQ where the checkpoint has scales
    text_encoder*.onnx, vae_decoder.onnx, tokenizer*/ and more     of a pipeline (see export/pipeline_files.py)
    engines/...               plans that were built ahead of time
    manifest.json             spec, graphs, engines, history, metrics, parity, and the sha256 of every file

Nothing that depends on the clock or on a path enters: the same checkpoint, exported again, gives the same bytes (except
for TensorRT plans, which TensorRT itself does not repeat).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from compress.checkpoint import Checkpoint, Quantization, write_folder
from compress.layout import read_layout
from compress.parts import load_part, part_names
from export.graph import Graph, save_graph
from export.parity import Parity, check_parity, check_part, trial_of
from export.pipeline_files import link_graph, write_graph, write_pipeline_files
from export.prove import prove_engine
from export.qdq import insert_qdq
from export.tensorrt_plan import build_plan, check_capabilities
from export.to_onnx import to_onnx
from export.trace import OPSET, trace
from runtime.bundle import MANIFEST, Bundle, load_bundle, seal
from runtime.engines import available
from runtime.errors import BadInput, MissingExtra, unknown_name

TARGETS = ("onnx", "openvino", "tensorrt")
GRAPH = "denoiser.onnx"


def write_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    targets: Sequence[str] = ("onnx",),
    *,
    name: str | None = None,
    float_graph: Graph | None = None,
    metrics: dict[str, Any] | None = None,
    capabilities: Sequence[str] = (),
    threads: int | None = None,
    fixed_size: bool = False,
    parts_from: Bundle | None = None,
) -> Bundle:
    """Export the checkpoint to a bundle in `folder`, check its parity with torch, and load it back.

    `float_graph` is what `export_float` gave for this checkpoint's network, where it was made already; `name` defaults
    to the network's class. `capabilities` are the GPUs that target tensorrt builds for, such as '8.9'; `threads` is for
    the engines that check parity; `fixed_size` makes the denoiser's graph for the spec's height and width alone;
    `parts_from` is a bundle of the same pipeline whose text encoders and decoder are taken over. Raises BadInput for an
    unknown target or a folder that is something else, MissingExtra for a target whose package is not installed, and
    GateFailed where an engine's images are not torch's.
    """
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("export target", target, TARGETS)
    # what can be refused is refused before the tracing, which may take minutes
    refuse_foreign(folder)
    if "openvino" in targets and "openvino" not in available():
        raise MissingExtra("openvino", "openvino", "target openvino")
    if "tensorrt" in targets:
        check_capabilities(capabilities)
    graph = to_onnx(checkpoint, fixed_size) if float_graph is None else float_graph
    if checkpoint.quantization is not None:
        graph = insert_qdq(graph, checkpoint.quantization)

    def fill(temporary: Path) -> None:
        size = _write_denoiser(checkpoint, graph, temporary)
        parts = {}
        for part in part_names(checkpoint):
            if parts_from is None:
                parts[part] = _write_part(checkpoint, part, temporary, threads)
            else:
                link_graph(parts_from.path, temporary, part)
                parts[part] = parts_from.manifest["graphs"][part]
        trial = trial_of(checkpoint, fixed_size)
        parity = check_parity(checkpoint, temporary / GRAPH, trial, threads=threads)
        promised = _integer_layers(checkpoint.quantization)
        proven = ["openvino"] if "openvino" in targets else []
        if checkpoint.quantization is not None:
            proven.append("onnxruntime")  # every bundle runs there, and parity has shown it: this is for the account
        engines = [prove_engine(engine, temporary / GRAPH, trial.spec, size, promised) for engine in proven]
        if "tensorrt" in targets:
            engines.append(build_plan(temporary / GRAPH, temporary, capabilities, checkpoint.spec))
        content = _content(checkpoint, name, graph, engines, metrics or {}, parity)
        content["graphs"]["denoiser"]["bytes"] = size
        content["graphs"] |= parts
        seal(temporary, content)

    write_folder(folder, fill)
    return load_bundle(folder)


def _write_denoiser(checkpoint: Checkpoint, graph: Graph, folder: Path) -> int:
    source = checkpoint.source
    if source.parts is None:
        return save_graph(graph, folder / GRAPH)
    write_pipeline_files(read_layout(source.parts), folder)
    return write_graph(graph, folder, Path(GRAPH).stem, source.folder, source.config)


def _write_part(checkpoint: Checkpoint, name: str, folder: Path, threads: int | None) -> dict[str, Any]:
    """Export one of the parts around the denoiser, in float32; returns its manifest entry."""
    part = load_part(checkpoint, name)
    graph = trace(part.module, part.forward, part.examples, part.outputs, part.axes)
    size = write_graph(graph, folder, part.name, part.name, part.config)
    return {
        "file": f"{part.name}.onnx",
        "inputs": _tensors(graph.proto.graph.input),
        "outputs": _tensors(graph.proto.graph.output),
        "opset": OPSET,
        "precision": "fp32",
        "bytes": size,
        "parameters": sum(parameter.numel() for parameter in part.module.parameters()),
        "parity": check_part(part, folder / f"{part.name}.onnx", threads=threads),
    }


def refuse_foreign(folder: Path) -> None:
    """Raise BadInput where writing a bundle to `folder` would replace something that is not one."""
    if (folder / MANIFEST).is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise BadInput(f"{folder}: exists and is not a bundle; choose another --out, or remove it first")


def _content(
    checkpoint: Checkpoint,
    name: str | None,
    graph: Graph,
    engines: list[dict[str, Any]],
    metrics: dict[str, Any],
    parity: Parity,
) -> dict[str, Any]:
    quantization = checkpoint.quantization
    layers = quantization.layers if quantization else []
    integer = _integer_layers(quantization)
    denoiser = {
        "file": GRAPH,
        "inputs": _tensors(graph.proto.graph.input),
        "outputs": _tensors(graph.proto.graph.output),
        "opset": OPSET,
        "precision": quantization.format if quantization else "fp32",
        "quantized_layers": integer,
        "weight_only_layers": sorted(set(layers) - set(integer)),
        "parameters": sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        "bytes_by_precision": _bytes_by_precision(graph),
    }
    return {
        "name": name or type(checkpoint.model).__name__,
        "spec": checkpoint.spec.to_json(),
        "graphs": {"denoiser": denoiser},
        "engines": engines,
        "history": [_timeless(asdict(record)) for record in checkpoint.history],
        "metrics": metrics,
        "parity": parity,
    }


def _integer_layers(quantization: Quantization | None) -> list[str]:
    """The layers that the graph promises on integers: with a scale for their input, not for their weight alone."""
    if quantization is None:
        return []
    return [layer for layer in quantization.layers if f"{layer}.input" in quantization.amax]


def _bytes_by_precision(graph: Graph) -> dict[str, int]:
    """dtype as numpy calls it -> bytes of all initializers in it, wherever they are stored; the largest first."""
    found: dict[str, int] = {}
    for tensor in graph.proto.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        weight = graph.weights.get(tensor.name)
        size = onnx.numpy_helper.to_array(tensor).nbytes if weight is None else weight.nbytes
        found[dtype] = found.get(dtype, 0) + size
    return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))


def _tensors(values: Sequence[onnx.ValueInfoProto]) -> dict[str, Any]:
    """name -> {dtype as numpy calls it, shape with a name for what is dynamic}."""
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        found[value.name] = {"dtype": dtype, "shape": shape}
    return found


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}
