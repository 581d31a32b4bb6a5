"""A pipeline's other components: text encoders, decoder and encoder of latents, each lowered, written and verified.

One component is in memory at a time. Those of the uncompressed model's bundle are reused if they are not quantized.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.config import ExportConfig
from diffpress.compress.models.components import DECODER, Component, component_names, load_component
from diffpress.compress.models.counts import parameter_count
from diffpress.compress.models.latent_encoder import encoding_autoencoder, load_encoder
from diffpress.compress.quantization.components import fake_quantized_component
from diffpress.compress.sources.layout import TEXT_ENCODERS
from diffpress.export.graph.trace import trace
from diffpress.export.lora_graphs import write_slots
from diffpress.export.lowering import PassContext, lower
from diffpress.export.manifest import graph_entry
from diffpress.export.passes.half_precision import FLOAT, kept_modules
from diffpress.export.targets.pipeline_folder import link_graph, write_graph
from diffpress.export.targets.precision import precision_of
from diffpress.export.verify.gate import ParityFailure, ParityGate, failures_of
from diffpress.export.verify.parity import check_component
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.encode import ENCODER

AUTOENCODER = (DECODER, ENCODER)


def export_components(
    checkpoint: Checkpoint, config: ExportConfig, folder: Path, gate: ParityGate, reuse: Bundle | None = None
) -> tuple[dict[str, dict[str, Any]], tuple[ParityFailure, ...]]:
    """Write the components of the checkpoint's pipeline into a bundle's folder.

    The autoencoder stays fp32: it overflows fp16. The float layers of a quantized component stay fp32 as well.

    Returns:
        Their manifest entries, and what failed parity.
    """
    entries = {}
    failures: list[ParityFailure] = []
    made_before = reuse.manifest["graphs"] if reuse else {}
    names = component_names(checkpoint)
    if exports_encoder(checkpoint, config):
        names.append(ENCODER)
    for name in names:
        scales = checkpoint.component_quantization.get(name)
        precision = FLOAT if name in AUTOENCODER or scales is not None else config.precision
        slots = config.lora_slots > 0 and name in TEXT_ENCODERS
        if scales is None and reuse is not None and made_before[name]["precision"] == precision and not slots:
            link_graph(reuse.path, folder, name)
            entries[name] = made_before[name]
            failures += [failure for failure in failures_of(reuse) if failure.graph == made_before[name]["file"]]
        else:
            component = load_encoder(checkpoint) if name == ENCODER else load_component(checkpoint, name)
            entries[name], failed = export_component(component, scales, precision, folder, config, gate)
            failures += failed
    return entries, tuple(failures)


def exports_encoder(checkpoint: Checkpoint, config: ExportConfig) -> bool:
    """Return whether the bundle has an encoder: it is asked for, or a network for inpainting needs it."""
    needed = bool(checkpoint.spec.conditioning.inpainting) and DECODER in component_names(checkpoint)
    return config.image_inputs or needed


def check_image_inputs(checkpoint: Checkpoint, config: ExportConfig) -> None:
    """Check that an encoder can be exported, before any work.

    Raises:
        InvalidInputError: The model has no autoencoder, or its file has no encoder.
    """
    if not exports_encoder(checkpoint, config):
        return
    if DECODER not in component_names(checkpoint) or checkpoint.source.pipeline_folder is None:
        if checkpoint.spec.is_picture:
            raise InvalidInputError("image_inputs: the model's samples are pixels, which need no encoder; leave it out")
        raise InvalidInputError(
            "image_inputs: the model came without an autoencoder that encodes images; export the pipeline's folder"
        )
    encoding_autoencoder(checkpoint)


def export_component(
    component: Component,
    scales: Quantization | None,
    precision: str,
    folder: Path,
    config: ExportConfig,
    gate: ParityGate,
) -> tuple[dict[str, Any], tuple[ParityFailure, ...]]:
    """Trace, lower, write and verify one component; return its manifest entry, and what failed parity."""
    module = component.module
    traced = trace(module, component.forward, component.examples, component.outputs, component.axes)
    context = PassContext(scales, precision, keep=kept_modules(module, precision), name=component.name)
    graph = lower(traced, "cpu", context)
    size = write_graph(graph, folder, component.name, component.name, component.config)
    file = f"{component.name}.onnx"
    quantized = None if scales is None else fake_quantized_component(component, scales)
    check = partial(check_component, component, threads=config.threads, precision=precision, gate=gate)
    parity, failures = check(folder / file, quantized)
    slots: dict[str, Any] = {}
    if config.lora_slots and component.name in TEXT_ENCODERS:
        slots["lora"] = write_slots(traced, context, config, folder / file)
        slots["lora"]["parity"], failed = check(folder / slots["lora"]["file"], quantized)
        failures += failed
    entry = {
        **graph_entry(file, graph, precision_of(scales, precision)),
        "bytes": size,
        "parameters": parameter_count(module),
        "parity": parity,
        **slots,
    }
    return entry, failures
