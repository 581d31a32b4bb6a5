"""Checkpoint -> bundle: lower the graphs, verify them in engines, package everything in one folder.

    denoiser.onnx (+ .data)   float, half precision, or with Q/DQ if the checkpoint has scales
    denoiser*.cached.onnx     the outer layers, for a plan with cached steps (export/passes/cut_graph.py)
    denoiser*.control.onnx, controlnet*.onnx                 for control images (export/controls.py)
    *.lora.onnx               forms of the graphs with slots for LoRAs (export/lora_graphs.py)
    denoiser.*.onnx           for engines that run these faster or run no other (export/denoiser.py)
    text_encoder*.onnx, vae_*.onnx, tokenizer*/ and more     of a pipeline (export/targets/pipeline_folder.py)
    engines/...               TensorRT engines built ahead of time
    sampler.onnx, triton/     a whole sampling run as one graph (export/targets/sampler/)
    web/                      a page that runs it in a browser (export/targets/web/)
    genai/                    the pipeline as OpenVINO GenAI reads it (export/targets/genai)
    README.md                 the model card (export/model_card.py)
    manifest.json             spec, graphs, engines, history, metrics, parity, and the sha256 of every file

The folder is written under a temporary name. Nothing in a bundle depends on the clock or on a path: exporting the same
checkpoint again gives the same bytes. Target tensorrt is the exception, because TensorRT builds are not reproducible
and the manifest records the build time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffpress.compress.checkpoint import Checkpoint, write_folder
from diffpress.compress.config import ExportConfig
from diffpress.compress.sources.layout import read_layout
from diffpress.compress.sources.terms import BASE_CARD, write_terms
from diffpress.export.components import check_image_inputs, export_components
from diffpress.export.controls import ExportedControls, check_controls, export_controls
from diffpress.export.denoiser import Denoiser, lower_denoiser
from diffpress.export.engine_variants import with_engine_variants
from diffpress.export.graph.model import save_graph
from diffpress.export.lora_graphs import check_lora_slots, write_denoiser_slots
from diffpress.export.manifest import manifest_content
from diffpress.export.model_card import write_model_card
from diffpress.export.passes.cut_graph import cached_file, write_cached_graph
from diffpress.export.passes.half_precision import FLOAT
from diffpress.export.targets.capability import check_supported, emulation_note
from diffpress.export.targets.genai.target import check_genai, check_genai_plan, genai_content
from diffpress.export.targets.pipeline_folder import write_graph, write_pipeline_files
from diffpress.export.targets.precision import layer_formats
from diffpress.export.targets.sampler.target import check_sampler, sampler_content
from diffpress.export.targets.tensorrt import ENGINE as TENSORRT
from diffpress.export.targets.tensorrt import build_engines, check_build
from diffpress.export.targets.web.target import check_web, web_content
from diffpress.export.verify.denoiser_check import checked_engines, verify_denoiser
from diffpress.export.verify.gate import ParityGate, log_failures, raise_failed
from diffpress.export.verify.latency import Latency, measure_latency, slower_engines
from diffpress.export.verify.parity import runs
from diffpress.runtime.bundle import MANIFEST, Bundle, load_bundle, seal
from diffpress.runtime.engines import available
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError

logger = logging.getLogger(__name__)

DEFAULTS = ExportConfig()


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    config: ExportConfig = DEFAULTS,
    *,
    name: str | None = None,
    metrics: dict[str, Any] | None = None,
    denoiser: Denoiser | None = None,
    latencies: Sequence[Latency] | None = None,
    reuse: Bundle | None = None,
    parity_sqnr_db: float | None = None,
    keep_failed: bool = False,
) -> Bundle:
    """Export the checkpoint to a bundle in `out`, verify it and load it.

    Args:
        checkpoint: The checkpoint to export.
        out: The bundle's folder; an existing bundle is replaced.
        config: Everything that a user chooses.
        name: Name in the manifest; by default the class of the network.
        metrics: Metrics for the manifest.
        denoiser: Result of `lower_denoiser` for this checkpoint and config, if it exists already.
        latencies: Latencies of the quantized graph on this machine; by default they are measured.
        reuse: Bundle of the same pipeline whose other components and their engines are reused.
        parity_sqnr_db: What the denoiser's graphs must reach, in place of the built-in bounds (verify/gate.py).
        keep_failed: Return a bundle that failed parity, instead of raising after it is written.

    Raises:
        InvalidInputError: For settings that do not fit the checkpoint, or if `out` contains something else than a
            bundle.
        MissingDependencyError: If the package of a target is not installed.
        GateFailedError: If an engine's output differs from torch's; the bundle is kept and lists it in its manifest.
    """
    check_output_folder(out)
    check_export(config, checkpoint.quantization is not None, layer_formats(checkpoint.quantization).values())
    check_components(config, bool(checkpoint.component_quantization))
    check_image_inputs(checkpoint, config)
    check_sampler(checkpoint.spec, config)
    check_web(checkpoint, config)
    check_genai(checkpoint, config)
    check_genai_plan(checkpoint, config)
    check_controls(checkpoint, config)
    check_lora_slots(config)
    denoiser = denoiser or with_engine_variants(lower_denoiser(checkpoint, config), config.threads)
    latencies = measure_latencies(denoiser, config) if latencies is None else latencies
    _log_expected_speed(latencies, denoiser)
    deployed = denoiser.reverted(slower_engines(latencies) if config.revert_slower else ())

    gate = ParityGate(config.targets, parity_sqnr_db)

    def fill(folder: Path) -> None:
        write_terms(deployed.checkpoint.source.terms, folder, card=BASE_CARD)
        sizes = _write_graphs(deployed, folder, config)
        cached = _write_cached_graphs(deployed, folder)
        slots = write_denoiser_slots(deployed, config, folder)
        verified = verify_denoiser(deployed, folder, sizes, config, gate, slots)
        components, component_failures = export_components(deployed.checkpoint, config, folder, gate, reuse)
        controls = export_controls(deployed, config, folder, gate)
        failures = (*verified.failures, *component_failures, *controls.failures)
        failed = any(failure.target for failure in failures)
        built = [] if failed else _build_engines(deployed, components, controls, config, folder, reuse)
        content = manifest_content(
            deployed, sizes, cached, verified, components, controls, built, name, metrics, failures, slots
        )
        if not failed:
            unsealed = Bundle(folder, deployed.checkpoint.spec, {**content, "files": {}})
            content |= sampler_content(unsealed, config) | web_content(unsealed, config)
            content |= genai_content(deployed, components, config, folder)
        seal(folder, content)
        log_failures(failures)

    write_folder(out, fill)
    bundle = load_bundle(out)
    write_model_card(bundle)
    if not keep_failed:
        raise_failed(bundle)
    return bundle


# --- before: settings that cannot be exported ------------------------------------------------------------------


def check_output_folder(folder: Path) -> None:
    """Check that writing a bundle to `folder` replaces nothing but a bundle.

    Raises:
        InvalidInputError: Otherwise.
    """
    if (folder / MANIFEST).is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InvalidInputError(f"{folder}: exists and is not a bundle; choose another --out, or remove it first")


def check_export(config: ExportConfig, quantized: bool, formats: Iterable[str] = ()) -> None:
    """Check that a model can be exported with these settings, before any work.

    Args:
        config: The settings.
        quantized: Whether the model is quantized.
        formats: Number formats of its layers, if they are known already.

    Raises:
        InvalidInputError: If a GPU does not run a format or TensorRT does not support an option, if no installed
            engine can check the precision, or if no graph would use it.
        MissingDependencyError: If the package of a target is not installed.
    """
    targets, precision, tensorrt = config.targets, config.precision, config.tensorrt
    if "openvino" in targets and "openvino" not in available():
        raise MissingDependencyError("openvino", "openvino", "target openvino")
    if TENSORRT in targets:
        check_build(tensorrt.compute_capabilities, tensorrt.options)
    if not runs(precision):
        raise InvalidInputError(
            f"precision {precision}: ONNX Runtime cannot run it on the CPU; install openvino, or use fp16"
        )
    if quantized and precision != FLOAT and TENSORRT not in targets:
        raise InvalidInputError(
            f"precision {precision}: the float layers of a quantized model stay fp32 in engines on the CPU, which "
            "would lose their integer kernels; add target tensorrt, or remove the precision"
        )
    if TENSORRT in targets:
        check_supported(formats, tensorrt.compute_capabilities)


def check_components(config: ExportConfig, quantized: bool) -> None:
    """Raise InvalidInputError if other components than the denoiser are quantized and TensorRT is a target."""
    if quantized and TENSORRT in config.targets:
        raise InvalidInputError(
            "quantize.components with target tensorrt is not supported: its graphs are made for engines on the CPU; "
            "remove one of them"
        )


# --- the steps -------------------------------------------------------------------------------------------------


def measure_latencies(denoiser: Denoiser, config: ExportConfig) -> list[Latency]:
    """Time the quantized graph against the float graph in the engines of the config's targets."""
    return measure_latency(denoiser, checked_engines(True, config.targets), config.threads)


def _log_expected_speed(latencies: Sequence[Latency], denoiser: Denoiser) -> None:
    for latency in latencies:
        logger.info(str(latency))
    if note := emulation_note(layer_formats(denoiser.portable.quantization).values()):
        logger.info(note)


def _write_graphs(denoiser: Denoiser, folder: Path, config: ExportConfig) -> dict[str, int]:
    """Write all graphs of the denoiser; return file -> bytes of graph and weights."""
    source, portable = denoiser.checkpoint.source, denoiser.portable
    # other graphs refer to the same data file
    shared = bool(denoiser.features or config.controlnet or config.lora_slots)
    if source.pipeline_folder is None:
        size = save_graph(portable.graph, folder / portable.file, data=f"{portable.file}.data" if shared else None)
    else:
        write_pipeline_files(read_layout(source.pipeline_folder), folder)
        size = write_graph(portable.graph, folder, Path(portable.file).stem, source.folder, source.config)
    return {portable.file: size} | {
        one.file: save_graph(one.graph, folder / one.file, data=f"{one.file}.data" if shared else None)
        for one in denoiser.variants
    }


def _write_cached_graphs(denoiser: Denoiser, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the cached graph of each graph of the denoiser; return the graph's file -> the manifest entry of it."""
    entries = {}
    for one in (denoiser.portable, *denoiser.variants) if denoiser.features else ():
        file = cached_file(one.file)
        size = write_cached_graph(folder / one.file, folder / file, denoiser.features)
        entries[one.file] = {"file": file, "features": list(denoiser.features), "bytes": size}
    return entries


def _build_engines(
    denoiser: Denoiser,
    components: dict[str, dict[str, Any]],
    controls: ExportedControls,
    config: ExportConfig,
    folder: Path,
    reuse: Bundle | None,
) -> list[dict[str, Any]]:
    """Build TensorRT engines of all graphs if it is a target; return their manifest entries."""
    if TENSORRT not in config.targets:
        return []
    own = denoiser.graph_for(TENSORRT)
    graphs = {"denoiser": (folder / own.file, own.precision)}
    others = {**components, **controls.networks}.items()
    graphs |= {name: (folder / entry["file"], entry["precision"]) for name, entry in others}
    if own.file in controls.controlled:
        graphs["denoiser_control"] = (folder / controls.controlled[own.file]["file"], own.precision)
    capabilities, options = config.tensorrt.compute_capabilities, config.tensorrt.options
    if denoiser.checkpoint.sparse_layers:
        options = replace(options, sparse_weights=True)
    return build_engines(folder, graphs, capabilities, denoiser.checkpoint.spec, options, reuse)
