"""Content of a bundle's manifest.json: spec, graphs, engines, history, metrics and parity.

    graphs: {denoiser: {file, inputs, outputs, opset, precision, ..., variants: {engine: {file, precision, ...}}},
             text_encoder: {file, inputs, outputs, opset, precision, ...}, ...}

Nothing in it depends on the clock or on a path, except for TensorRT engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import onnx

from diffpress.compress.models.counts import parameter_count
from diffpress.export.denoiser import Denoiser, TargetGraph
from diffpress.export.graph.model import Graph
from diffpress.export.graph.opsets import opset_of
from diffpress.export.targets.precision import computing_layers, layer_formats
from diffpress.export.verify.denoiser_check import Verified
from diffpress.export.verify.gate import ParityFailure
from diffpress.runtime.bundle import required_features

if TYPE_CHECKING:
    from diffpress.export.controls import ExportedControls


def graph_entry(file: str, graph: Graph, precision: str) -> dict[str, Any]:
    """Return what the entry of every graph begins with."""
    return {
        "file": file,
        "inputs": tensors_of(graph.proto.graph.input),
        "outputs": tensors_of(graph.proto.graph.output),
        "opset": opset_of(graph),
        "precision": precision,
    }


def manifest_content(
    denoiser: Denoiser,
    sizes: Mapping[str, int],
    cached: Mapping[str, dict[str, Any]],
    verified: Verified,
    components: dict[str, dict[str, Any]],
    controls: ExportedControls,
    built: list[dict[str, Any]],
    name: str | None,
    metrics: dict[str, Any] | None,
    failures: Sequence[ParityFailure] = (),
    slots: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the manifest of a bundle without its files.

    Args:
        denoiser: The denoiser.
        sizes: File -> bytes of graph and weights.
        cached: File -> entry of the cached graph that was cut from it.
        verified: What was measured of the denoiser's graphs.
        components: Entries of the other graphs.
        controls: Entries of control networks and controlled graphs.
        built: Entries of engines that were built.
        name: Name of the bundle; None for the class of the network.
        metrics: Metrics, if there are any.
        failures: What failed parity, in any engine.
        slots: File -> entry of its form with slots for LoRAs.
    """
    checkpoint = denoiser.checkpoint
    with_slots = {file: entry | {"parity": verified.slots[entry["file"]]} for file, entry in slots.items()}
    derived: dict[str, dict[str, Any]] = {}
    for kind, entries in (("cached", cached), ("controlled", controls.controlled), ("lora", with_slots)):
        for file, entry in entries.items():
            derived[file] = derived.get(file, {}) | {kind: entry}
    named = {"control_networks": list(controls.networks)} if controls.networks else {}
    return {
        "requires": required_features(checkpoint.spec, components),
        "name": name or type(checkpoint.model).__name__,
        "family": checkpoint.source.kind,
        "spec": checkpoint.spec.to_json(),
        "graphs": {
            "denoiser": _denoiser_entry(denoiser, sizes, derived, verified) | named,
            **components,
            **controls.networks,
        },
        "engines": [*verified.engines, *built],
        "history": [_timeless(asdict(record)) for record in checkpoint.history],
        "metrics": metrics or {},
        "parity": verified.parity,
        **({"parity_failures": [asdict(failure) for failure in failures]} if failures else {}),
    }


def _denoiser_entry(
    denoiser: Denoiser, sizes: Mapping[str, int], derived: Mapping[str, dict[str, Any]], verified: Verified
) -> dict[str, Any]:
    portable, checkpoint = denoiser.portable, denoiser.checkpoint
    layers = portable.quantization.layers if portable.quantization else []
    integer, timesteps = computing_layers(portable.quantization), checkpoint.spec.fixed_timesteps
    return {
        **graph_entry(portable.file, portable.graph, portable.precision),
        "formats": dict(Counter(layer_formats(portable.quantization).values())),
        "quantized_layers": integer,
        **({"sparse_layers": list(denoiser.sparse_layers)} if denoiser.sparse_layers else {}),
        "weight_only_layers": sorted(set(layers) - set(integer)),
        "parameters": parameter_count(checkpoint.model),
        "bytes_by_precision": bytes_by_precision(portable.graph),
        **({"timesteps": list(timesteps)} if timesteps else {}),
        "bytes": sizes[portable.file],
        **derived.get(portable.file, {}),
        "variants": {
            engine: _variant_entry(variant, sizes[variant.file], verified.variants[variant.file].get(engine))
            | derived.get(variant.file, {})
            for variant in denoiser.variants
            for engine in variant.engines
        },
    }


def _variant_entry(variant: TargetGraph, size: int, parity: dict[str, float] | None) -> dict[str, Any]:
    """Return the entry of a graph that an engine runs instead of denoiser.onnx; no parity if it was not run in it."""
    return {
        "file": variant.file,
        "precision": variant.precision,
        "bytes": size,
        "bytes_by_precision": bytes_by_precision(variant.graph),
        **({} if parity is None else {"parity": parity}),
    }


def bytes_by_precision(graph: Graph) -> dict[str, int]:
    """Return numpy dtype name -> bytes of all initializers of that dtype, the largest first."""
    found: dict[str, int] = {}
    for tensor in graph.proto.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        weight = graph.weights.get(tensor.name)
        size = onnx.numpy_helper.to_array(tensor).nbytes if weight is None else weight.nbytes
        found[dtype] = found.get(dtype, 0) + size
    return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))


def tensors_of(values: Sequence[onnx.ValueInfoProto]) -> dict[str, Any]:
    """Return name -> {numpy dtype name, shape with names for dynamic dimensions}."""
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        found[value.name] = {"dtype": dtype, "shape": shape}
    return found


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}
