"""Checkpoint -> bundle: graph, proof, engines, manifest, in a temporary folder that is renamed when it is whole.

    denoiser.onnx (+ .data)   float, or with Q/DQ where the checkpoint has scales; or in half precision
    denoiser.*.onnx           other forms of it, for engines that run those better (export/targets/variants.py) or no other
    text_encoder*.onnx, vae_decoder.onnx, tokenizer*/ and more     of a pipeline (see export/targets/pipeline_folder.py)
    engines/...               plans that were built ahead of time
    manifest.json             spec, graphs, engines, history, metrics, parity, and the sha256 of every file

Nothing that depends on the clock or on a path enters: the same checkpoint, exported again, gives the same bytes. Target
tensorrt is the exception: TensorRT does not repeat a plan's bytes, and a plan's entry says how long it took to build.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, write_folder
from diffpress.compress.context import say
from diffpress.compress.models.components import DECODER, component_names, load_component
from diffpress.compress.sources.layout import read_layout
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.graph.opsets import opset_of
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.graph.trace import trace
from diffpress.export.passes.bf16_to_fp32 import widened
from diffpress.export.passes.half_precision import FLOAT, PRECISIONS, kept_modules, to_half
from diffpress.export.passes.insert_qdq import insert_qdq
from diffpress.export.targets.capability import check_runs, emulated, emulation, promised
from diffpress.export.targets.pipeline_folder import link_graph, write_graph, write_pipeline_files
from diffpress.export.targets.precision import computing_layers, layer_formats, precision_of
from diffpress.export.targets.tensorrt import DEFAULTS, build_engines, check_build
from diffpress.export.targets.tensorrt import ENGINE as TENSORRT
from diffpress.export.targets.variants import Variant, bytes_by_precision, check_variants, write_variants
from diffpress.export.verify.engine_check import check_engine
from diffpress.export.verify.parity import Parity, Trial, check_component, check_parity, runs, trial_of
from diffpress.runtime.bundle import MANIFEST, Bundle, load_bundle, seal
from diffpress.runtime.engines import available
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError, unknown_name

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
    """Export the checkpoint to a bundle in `folder`, check its parity with torch, and load it back.

    `float_graph` is what `export_float` gave for this checkpoint's network, where it was made already; `name` defaults
    to the network's class. `variants` are for engines that shall not run denoiser.onnx itself. `capabilities` are the
    GPUs that target tensorrt builds for, such as '8.9', in the way of `build`; `threads` is for the engines that check
    parity; `fixed_size` makes the denoiser's graph for the spec's height and width alone; `components_from` is a bundle of
    the same pipeline whose text encoders and decoder are taken over. `precision` 'fp16' or 'bf16' is that of denoiser
    and text encoders. The decoder, which overflows fp16, stays fp32, and so does what engines on the CPU take of a
    quantized denoiser: ONNX Runtime has no integer kernels with scales in fp16. Raises InvalidInputError for an unknown target
    or a folder that is something else, MissingDependencyError for a target whose package is not installed, and GateFailedError where
    an engine's images are not torch's.
    """
    # what can be refused is refused before the tracing, which may take minutes
    refuse_foreign(folder)
    check_targets(targets, capabilities, build)
    check_precision(precision, checkpoint.quantization is not None, targets)
    check_variants(variants)
    if "tensorrt" in targets:
        check_runs(layer_formats(checkpoint.quantization).values(), capabilities)
    if note := emulation(layer_formats(checkpoint.quantization).values()):
        say(note)
    exact = to_onnx(checkpoint, fixed_size) if float_graph is None else float_graph
    if checkpoint.quantization is None:
        graph, computed_in = _rounded(exact, checkpoint.model, precision, "denoiser"), precision
    else:
        graph, computed_in = insert_qdq(exact, checkpoint.quantization), FLOAT

    def fill(temporary: Path) -> None:
        size = _write_denoiser(checkpoint, graph, temporary)
        parts = {}
        for part in component_names(checkpoint):
            wanted = FLOAT if part == DECODER else precision
            if components_from is None or components_from.manifest["graphs"][part]["precision"] != wanted:
                parts[part] = _write_component(checkpoint, part, temporary, threads, wanted)
            else:
                link_graph(components_from.path, temporary, part)
                parts[part] = components_from.manifest["graphs"][part]
        trial = trial_of(checkpoint, fixed_size)
        parity = check_parity(checkpoint, temporary / GRAPH, trial, threads=threads, precision=computed_in)
        taken = write_variants(checkpoint, variants, temporary, trial, threads)
        computed = {engine: variant.quantization for variant in variants for engine in variant.engines}
        engines = []
        for engine in checked_engines(checkpoint.quantization is not None, targets):
            entry = taken.get(engine, {"file": GRAPH, "bytes": size})
            quantization = computed.get(engine, checkpoint.quantization)
            proof = check_engine(engine, temporary / entry["file"], trial.spec, entry["bytes"], promised(quantization))
            engines.append(proof | {"emulated": emulated(layer_formats(quantization).values())})
        if "tensorrt" in targets:
            path, in_plan = temporary / GRAPH, computed_in
            if checkpoint.quantization is not None:
                in_plan = precision_of(checkpoint.quantization) + ("" if precision == FLOAT else f"+{precision}")
                path, what = temporary / TENSORRT_GRAPH, "denoiser for TensorRT"
                rounded = insert_qdq(exact, checkpoint.quantization, tensorrt=True)
                for_tensorrt = _rounded(rounded, checkpoint.model, precision, what)
                save_graph(for_tensorrt, path)
                if precision != FLOAT:  # no engine on the CPU takes this graph otherwise
                    _check_rounded(checkpoint, for_tensorrt, path, trial, threads, precision)
                taken[TENSORRT] = {
                    "file": path.name,
                    "precision": in_plan,
                    "bytes": path.stat().st_size,
                    "bytes_by_precision": bytes_by_precision(for_tensorrt),
                }
            sources = {part: (temporary / entry["file"], entry["precision"]) for part, entry in parts.items()}
            sources = {"denoiser": (path, in_plan), **sources}
            engines += build_engines(temporary, sources, capabilities, checkpoint.spec, build, components_from)
        content = _content(checkpoint, name, graph, engines, metrics or {}, parity, computed_in)
        content["graphs"]["denoiser"] |= {"bytes": size, "variants": taken}
        content["graphs"] |= parts
        seal(temporary, content)

    write_folder(folder, fill)
    return load_bundle(folder)


def check_targets(targets: Sequence[str], capabilities: Sequence[str] = (), build: BuildOptions = DEFAULTS) -> None:
    """Raise InvalidInputError for an unknown target or GPU, and MissingDependencyError for a target whose package is not installed."""
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("export target", target, TARGETS)
    if "openvino" in targets and "openvino" not in available():
        raise MissingDependencyError("openvino", "openvino", "target openvino")
    if "tensorrt" in targets:
        check_build(capabilities, build)


def check_precision(precision: str, quantized: bool, targets: Sequence[str]) -> None:
    """Raise InvalidInputError for a precision that is unknown, that no engine here could check, or that no graph would be in."""
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if not runs(precision):
        raise InvalidInputError(
            f"precision {precision}: ONNX Runtime cannot run it on the CPU; install openvino, or take fp16"
        )
    if quantized and precision != FLOAT and "tensorrt" not in targets:
        raise InvalidInputError(
            f"precision {precision}: what a quantized model computes in float stays fp32 in engines on the CPU, which "
            "would lose their integer kernels; add target tensorrt, or leave the precision out"
        )


def checked_engines(quantized: bool, targets: Sequence[str]) -> list[str]:
    """The engines that are run for the manifest's account of a bundle for these targets."""
    proven = ["openvino"] if "openvino" in targets else []
    # every bundle runs in ONNX Runtime, and parity has shown it: there it is the account of the integers
    return [*proven, "onnxruntime"] if quantized else proven


def _write_denoiser(checkpoint: Checkpoint, graph: Graph, folder: Path) -> int:
    source = checkpoint.source
    if source.parts is None:
        return save_graph(graph, folder / GRAPH)
    write_pipeline_files(read_layout(source.parts), folder)
    return write_graph(graph, folder, Path(GRAPH).stem, source.folder, source.config)


def _rounded(graph: Graph, module: nn.Module, precision: str, what: str) -> Graph:
    if precision == FLOAT:
        return graph
    found, lost = to_half(graph, precision, kept_modules(module, precision))
    say(f"{what} in {precision}: {lost}")
    return found


def _check_rounded(
    checkpoint: Checkpoint, graph: Graph, path: Path, trial: Trial, threads: int | None, precision: str
) -> None:
    """Parity of the quantized graph in half precision that lies at `path`."""
    if precision != "bf16":
        check_parity(checkpoint, path, trial, engines=runs(precision)[-1:], threads=threads, precision=precision)
        return
    wide = path.with_name(f"{path.name}.{FLOAT}")
    save_graph(widened(graph), wide)
    check_parity(checkpoint, wide, trial, engines=runs(FLOAT)[-1:], threads=threads)
    for file in path.parent.glob(f"{wide.name}*"):
        file.unlink()


def _write_component(
    checkpoint: Checkpoint, name: str, folder: Path, threads: int | None, precision: str
) -> dict[str, Any]:
    """Export one of the parts around the denoiser; returns its manifest entry."""
    part = load_component(checkpoint, name)
    graph = trace(part.module, part.forward, part.examples, part.outputs, part.axes)
    graph = _rounded(graph, part.module, precision, name)
    size = write_graph(graph, folder, part.name, part.name, part.config)
    return {
        "file": f"{part.name}.onnx",
        "inputs": _tensors(graph.proto.graph.input),
        "outputs": _tensors(graph.proto.graph.output),
        "opset": opset_of(graph),
        "precision": precision,
        "bytes": size,
        "parameters": sum(parameter.numel() for parameter in part.module.parameters()),
        "parity": check_component(part, folder / f"{part.name}.onnx", threads=threads, precision=precision),
    }


def refuse_foreign(folder: Path) -> None:
    """Raise InvalidInputError where writing a bundle to `folder` would replace something that is not one."""
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
        "spec": checkpoint.spec.to_json(),
        "graphs": {"denoiser": denoiser},
        "engines": engines,
        "history": [_timeless(asdict(record)) for record in checkpoint.history],
        "metrics": metrics,
        "parity": parity,
    }


def _tensors(values: Sequence[onnx.ValueInfoProto]) -> dict[str, Any]:
    """Name -> {dtype as numpy calls it, shape with a name for what is dynamic}."""
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        found[value.name] = {"dtype": dtype, "shape": shape}
    return found


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}
