"""Checkpoint -> bundle: graphs, checks, engines and manifest, written atomically via a temporary folder.

    denoiser.onnx (+ .data)   float, half precision, or with Q/DQ if the checkpoint has scales
    denoiser.*.onnx           variants for engines that run these faster (export/targets/variants.py) or run no other
    text_encoder*.onnx, vae_decoder.onnx, tokenizer*/ and more     of a pipeline (see export/targets/pipeline_folder.py)
    engines/...               TensorRT engines built ahead of time
    manifest.json             spec, graphs, engines, history, metrics, parity, and the sha256 of every file

Nothing in a bundle depends on the clock or on a path: exporting the same checkpoint again gives the same bytes. Target
tensorrt is the exception, because TensorRT builds are not reproducible and the manifest records the build time.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, write_folder
from diffpress.compress.models.components import DECODER, component_names, load_component
from diffpress.compress.sources.layout import read_layout
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.graph.opsets import opset_of
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.graph.trace import trace
from diffpress.export.passes.bf16_to_fp32 import bf16_to_fp32
from diffpress.export.passes.half_precision import FLOAT, PRECISIONS, kept_modules, to_half
from diffpress.export.passes.insert_qdq import insert_qdq
from diffpress.export.targets.capability import check_supported, emulated, emulation_note, expected_integer_layers
from diffpress.export.targets.pipeline_folder import link_graph, write_graph, write_pipeline_files
from diffpress.export.targets.precision import computing_layers, layer_formats, precision_of
from diffpress.export.targets.tensorrt import DEFAULTS, build_engines, check_build
from diffpress.export.targets.tensorrt import ENGINE as TENSORRT
from diffpress.export.targets.variants import Variant, bytes_by_precision, check_variants, write_variants
from diffpress.export.verify.engine_check import check_engine
from diffpress.export.verify.parity import Parity, ParityCase, check_component, check_parity, parity_case_for, runs
from diffpress.runtime.bundle import MANIFEST, Bundle, load_bundle, seal
from diffpress.runtime.engines import available
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError, unknown_name

logger = logging.getLogger(__name__)

TARGETS = ("onnx", "openvino", "tensorrt")
GRAPH = "denoiser.onnx"
TENSORRT_GRAPH = "denoiser.tensorrt.onnx"


def write_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    targets: Sequence[str] = ("onnx",),
    *,
    name: str | None = None,
    float_graph: Graph | None = None,
    variants: Sequence[Variant] = (),
    metrics: dict[str, Any] | None = None,
    capabilities: Sequence[str] = (),
    threads: int | None = None,
    fixed_size: bool = False,
    components_from: Bundle | None = None,
    precision: str = FLOAT,
    build: BuildOptions = DEFAULTS,
) -> Bundle:
    """Export the checkpoint to a bundle in `folder`, check its parity with torch, and load it.

    Args:
        checkpoint: The checkpoint to export.
        folder: The bundle's folder; an existing bundle is replaced.
        targets: Of "onnx", "openvino" and "tensorrt".
        name: Name in the manifest; by default the class of the network.
        float_graph: Result of `to_onnx` or `export_float` for this checkpoint, if it exists already.
        variants: Graphs for engines that should not run denoiser.onnx itself.
        metrics: Metrics for the manifest.
        capabilities: GPUs that target tensorrt builds for, such as '8.9'.
        threads: Threads of the engines that check parity.
        fixed_size: Fix the denoiser's height and width to the spec's.
        components_from: Bundle of the same pipeline whose text encoders and decoder are reused.
        precision: Precision of the denoiser and text encoders: 'fp32', 'fp16' or 'bf16'. The decoder overflows fp16 and
            stays fp32. So do the float parts of a quantized denoiser in engines on the CPU, because ONNX Runtime has no
            integer kernels with fp16 scales.
        build: Build options of TensorRT engines.

    Raises:
        InvalidInputError: For an unknown target, or if `folder` contains something else than a bundle.
        MissingDependencyError: If the package of a target is not installed.
        GateFailedError: If an engine's output differs from torch's.
    """
    # reject invalid arguments before tracing, which may take minutes
    check_output_folder(folder)
    check_targets(targets, capabilities, build)
    check_precision(precision, checkpoint.quantization is not None, targets)
    check_variants(variants)
    if "tensorrt" in targets:
        check_supported(layer_formats(checkpoint.quantization).values(), capabilities)
    if note := emulation_note(layer_formats(checkpoint.quantization).values()):
        logger.info(note)
    exact = to_onnx(checkpoint, fixed_size) if float_graph is None else float_graph
    if checkpoint.quantization is None:
        graph, computed_in = _rounded(exact, checkpoint.model, precision, "denoiser"), precision
    else:
        graph, computed_in = insert_qdq(exact, checkpoint.quantization), FLOAT

    def fill(temporary: Path) -> None:
        size = _write_denoiser(checkpoint, graph, temporary)
        components = {}
        for component in component_names(checkpoint):
            component_precision = FLOAT if component == DECODER else precision
            if (
                components_from is None
                or components_from.manifest["graphs"][component]["precision"] != component_precision
            ):
                components[component] = _write_component(checkpoint, component, temporary, threads, component_precision)
            else:
                link_graph(components_from.path, temporary, component)
                components[component] = components_from.manifest["graphs"][component]
        trial = parity_case_for(checkpoint, fixed_size)
        parity = check_parity(checkpoint, temporary / GRAPH, trial, threads=threads, precision=computed_in)
        replacements = write_variants(checkpoint, variants, temporary, trial, threads)
        computed = {engine: variant.quantization for variant in variants for engine in variant.engines}
        engines = []
        for engine in checked_engines(checkpoint.quantization is not None, targets):
            entry = replacements.get(engine, {"file": GRAPH, "bytes": size})
            quantization = computed.get(engine, checkpoint.quantization)
            report = check_engine(
                engine, temporary / entry["file"], trial.spec, entry["bytes"], expected_integer_layers(quantization)
            )
            engines.append(report | {"emulated": emulated(layer_formats(quantization).values())})
        if "tensorrt" in targets:
            path, trt_precision = temporary / GRAPH, computed_in
            if checkpoint.quantization is not None:
                trt_precision = precision_of(checkpoint.quantization) + ("" if precision == FLOAT else f"+{precision}")
                path, what = temporary / TENSORRT_GRAPH, "denoiser for TensorRT"
                rounded = insert_qdq(exact, checkpoint.quantization, tensorrt=True)
                for_tensorrt = _rounded(rounded, checkpoint.model, precision, what)
                save_graph(for_tensorrt, path)
                if precision != FLOAT:  # otherwise unchecked: engines on the CPU run the fp32 graph
                    _check_rounded(checkpoint, for_tensorrt, path, trial, threads, precision)
                replacements[TENSORRT] = {
                    "file": path.name,
                    "precision": trt_precision,
                    "bytes": path.stat().st_size,
                    "bytes_by_precision": bytes_by_precision(for_tensorrt),
                }
            sources = {key: (temporary / entry["file"], entry["precision"]) for key, entry in components.items()}
            sources = {"denoiser": (path, trt_precision), **sources}
            engines += build_engines(temporary, sources, capabilities, checkpoint.spec, build, components_from)
        content = _content(checkpoint, name, graph, engines, metrics or {}, parity, computed_in)
        content["graphs"]["denoiser"] |= {"bytes": size, "variants": replacements}
        content["graphs"] |= components
        seal(temporary, content)

    write_folder(folder, fill)
    return load_bundle(folder)


def check_targets(targets: Sequence[str], capabilities: Sequence[str] = (), build: BuildOptions = DEFAULTS) -> None:
    """Check that the targets can be built.

    Raises:
        InvalidInputError: For an unknown target or GPU.
        MissingDependencyError: If the package of a target is not installed.
    """
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("export target", target, TARGETS)
    if "openvino" in targets and "openvino" not in available():
        raise MissingDependencyError("openvino", "openvino", "target openvino")
    if "tensorrt" in targets:
        check_build(capabilities, build)


def check_precision(precision: str, quantized: bool, targets: Sequence[str]) -> None:
    """Check that the precision can be exported and verified.

    Raises:
        InvalidInputError: If the precision is unknown, if no installed engine can check it, or if no graph would
            use it.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if not runs(precision):
        raise InvalidInputError(
            f"precision {precision}: ONNX Runtime cannot run it on the CPU; install openvino, or use fp16"
        )
    if quantized and precision != FLOAT and "tensorrt" not in targets:
        raise InvalidInputError(
            f"precision {precision}: the float layers of a quantized model stay fp32 in engines on the CPU, which "
            "would lose their integer kernels; add target tensorrt, or remove the precision"
        )


def checked_engines(quantized: bool, targets: Sequence[str]) -> list[str]:
    """Return the engines whose executed precision is recorded in the manifest for these targets."""
    engines = ["openvino"] if "openvino" in targets else []
    # every bundle runs in ONNX Runtime, as parity has shown; only quantized ones need a precision report there
    return [*engines, "onnxruntime"] if quantized else engines


def _write_denoiser(checkpoint: Checkpoint, graph: Graph, folder: Path) -> int:
    source = checkpoint.source
    if source.pipeline_folder is None:
        return save_graph(graph, folder / GRAPH)
    write_pipeline_files(read_layout(source.pipeline_folder), folder)
    return write_graph(graph, folder, Path(GRAPH).stem, source.folder, source.config)


def _rounded(graph: Graph, module: nn.Module, precision: str, what: str) -> Graph:
    if precision == FLOAT:
        return graph
    found, lost = to_half(graph, precision, kept_modules(module, precision))
    logger.info(f"{what} in {precision}: {lost}")
    return found


def _check_rounded(
    checkpoint: Checkpoint, graph: Graph, path: Path, trial: ParityCase, threads: int | None, precision: str
) -> None:
    """Check parity of the quantized graph in half precision at `path`."""
    if precision != "bf16":
        check_parity(checkpoint, path, trial, engines=runs(precision)[-1:], threads=threads, precision=precision)
        return
    wide = path.with_name(f"{path.name}.{FLOAT}")
    save_graph(bf16_to_fp32(graph), wide)
    check_parity(checkpoint, wide, trial, engines=runs(FLOAT)[-1:], threads=threads)
    for file in path.parent.glob(f"{wide.name}*"):
        file.unlink()


def _write_component(
    checkpoint: Checkpoint, name: str, folder: Path, threads: int | None, precision: str
) -> dict[str, Any]:
    """Export a pipeline component other than the denoiser; return its manifest entry."""
    component = load_component(checkpoint, name)
    graph = trace(component.module, component.forward, component.examples, component.outputs, component.axes)
    graph = _rounded(graph, component.module, precision, name)
    size = write_graph(graph, folder, component.name, component.name, component.config)
    return {
        "file": f"{component.name}.onnx",
        "inputs": _tensors(graph.proto.graph.input),
        "outputs": _tensors(graph.proto.graph.output),
        "opset": opset_of(graph),
        "precision": precision,
        "bytes": size,
        "parameters": sum(parameter.numel() for parameter in component.module.parameters()),
        "parity": check_component(component, folder / f"{component.name}.onnx", threads=threads, precision=precision),
    }


def check_output_folder(folder: Path) -> None:
    """Check that writing a bundle to `folder` replaces nothing but a bundle.

    Raises:
        InvalidInputError: Otherwise.
    """
    if (folder / MANIFEST).is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InvalidInputError(f"{folder}: exists and is not a bundle; choose another --out, or remove it first")


def _content(
    checkpoint: Checkpoint,
    name: str | None,
    graph: Graph,
    engines: list[dict[str, Any]],
    metrics: dict[str, Any],
    parity: Parity,
    precision: str,
) -> dict[str, Any]:
    quantization = checkpoint.quantization
    layers = quantization.layers if quantization else []
    integer = computing_layers(quantization)
    denoiser = {
        "file": GRAPH,
        "inputs": _tensors(graph.proto.graph.input),
        "outputs": _tensors(graph.proto.graph.output),
        "opset": opset_of(graph),
        "precision": precision_of(quantization, precision),
        "formats": dict(Counter(layer_formats(quantization).values())),
        "quantized_layers": integer,
        "weight_only_layers": sorted(set(layers) - set(integer)),
        "parameters": sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        "bytes_by_precision": bytes_by_precision(graph),
    }
    if checkpoint.spec.fixed_timesteps:
        denoiser["timesteps"] = list(checkpoint.spec.fixed_timesteps)
    return {
        "name": name or type(checkpoint.model).__name__,
        "family": checkpoint.source.kind,
        "spec": checkpoint.spec.to_json(),
        "graphs": {"denoiser": denoiser},
        "engines": engines,
        "history": [_timeless(asdict(record)) for record in checkpoint.history],
        "metrics": metrics,
        "parity": parity,
    }


def _tensors(values: Sequence[onnx.ValueInfoProto]) -> dict[str, Any]:
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
