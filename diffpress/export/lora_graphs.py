"""The forms of a bundle's graphs with slots for LoRAs, written beside them over the same weights.

denoiser.onnx           what runs while no LoRA is set: it costs nothing
denoiser.lora.onnx      the same with branches of low rank (export/passes/lora_slots.py), and only its own weights
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import ExportConfig
from diffpress.compress.models.kept_indices import kept_to_json
from diffpress.export.denoiser import Denoiser
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.lowering import PassContext, lower
from diffpress.export.passes.cut_graph import cached_file, write_cached_graph
from diffpress.export.passes.half_precision import kept_modules
from diffpress.export.passes.lora_slots import slot_layers, with_lora_slots
from diffpress.export.targets.tensorrt import ENGINE as TENSORRT
from diffpress.runtime.errors import InvalidInputError


def check_lora_slots(config: ExportConfig) -> None:
    """Raise InvalidInputError if slots for LoRAs do not go with the other settings."""
    if config.lora_slots and TENSORRT in config.targets:
        raise InvalidInputError(
            "lora_slots: TensorRT engines have no slots for LoRAs; leave out target tensorrt, or fuse the LoRA before "
            "the export (--lora)"
        )


def lora_file(file: str) -> str:
    """Return the name of a graph's form with slots: 'denoiser.lora.onnx'."""
    return f"{file.removesuffix('.onnx')}.lora.onnx"


def write_denoiser_slots(denoiser: Denoiser, config: ExportConfig, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the form with slots of every graph of the denoiser; return the graph's file -> manifest entry of it."""
    entries: dict[str, dict[str, Any]] = {}
    checkpoint = denoiser.checkpoint
    keep = kept_modules(checkpoint.model, config.precision)
    for one in (denoiser.portable, *denoiser.variants) if config.lora_slots else ():
        context = PassContext(one.quantization, one.float_precision, keep, name=f"{one.file} with slots")
        entry = write_slots(denoiser.float_graph, context, config, folder / one.file)
        layers = {name: layer | _pruned(checkpoint, name) for name, layer in entry["layers"].items()}
        entries[one.file] = entry | {"component": checkpoint.source.folder, "layers": layers}
        if denoiser.features:
            path, file = folder / str(entry["file"]), cached_file(str(entry["file"]))
            size = write_cached_graph(path, folder / file, denoiser.features)
            entries[one.file]["cached"] = {"file": file, "features": list(denoiser.features), "bytes": size}
    return entries


def write_slots(graph: Graph, context: PassContext, config: ExportConfig, path: Path) -> dict[str, Any]:
    """Write the form with slots of a graph that is in `path`; return its manifest entry (runtime/lora/slots.py).

    Args:
        graph: The graph before it was lowered with `context`.
        context: What it was lowered with.
        config: Slots and their rank.
        path: File of the lowered graph, with a data file.
    """
    layers = slot_layers(graph, convolutions=config.lora_layers == "all")
    without = sorted(slot_layers(graph, convolutions=True).keys() - layers.keys())
    slotted = lower(with_lora_slots(graph, layers, config.lora_slots * config.lora_rank), "cpu", context)
    file = lora_file(path.name)
    return {
        "file": file,
        "slots": config.lora_slots,
        "rank": config.lora_rank,
        "layers": {name: {"shape": list(shape)} for name, shape in layers.items()},
        "without": without,
        "bytes": save_graph(slotted, path.with_name(file), beside=path),
    }


def _pruned(checkpoint: Checkpoint, layer: str) -> dict[str, Any]:
    """Return what a pruned layer kept and its unpruned [out, in]; nothing for one that is whole."""
    weight = f"{layer}.weight"
    kept = kept_to_json({weight: checkpoint.kept_indices.get(weight, {})})[weight]
    widths = checkpoint.source.original.get(layer, {})
    sides = [widths.get(f"{side}_features", widths.get(f"{side}_channels")) for side in ("out", "in")]
    return {"kept": kept, "unpruned": sides} if kept and None not in sides else {}
