"""LoRA files -> factors of the layers of a bundle that have slots. Every tensor is used, or the file is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.runtime.bundle import Bundle, sha256
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.lora.names import ALPHA, DOWN, UP, Layer, split_name, stems
from diffpress.runtime.lora.safetensors_file import read_safetensors
from diffpress.runtime.lora.scales import DENOISER, PEFT_FILE, factor, read_configs
from diffpress.runtime.lora.slots import Factors, Slots

FOLDER_FILES = ("pytorch_lora_weights.safetensors", PEFT_FILE)  # of diffusers and PEFT
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

Parts = dict[str, tuple[str, np.ndarray]]  # DOWN, UP, ALPHA -> name and tensor, of one layer
Loras = dict[str, list[dict[str, Factors]]]  # graph -> layer -> factors, of each LoRA that changes it


@dataclass(frozen=True)
class _Target:
    """What LoRAs are read for.

    Attributes:
        bundle: The bundle.
        component: Folder of the denoiser in its pipeline.
        slots: Slots by graph.
        stems: Names of the layers with slots in LoRA files.
        without: The same of layers that have no slots.
    """

    bundle: Bundle
    component: str
    slots: Mapping[str, Slots]
    stems: Mapping[str, Layer]
    without: Mapping[str, Layer] = field(default_factory=dict)


def read_loras(bundle: Bundle, loras: Mapping[str | Path, float]) -> Loras:
    """Return the factors of LoRA files (file or folder -> scale), for the graphs of a bundle that they change.

    Raises:
        InvalidInputError: The bundle has no slots or too few, or a file does not fit it completely.
    """
    if not loras:
        return {}
    bundle.lora_graph(DENOISER)  # raises without slots
    target = _target(bundle)
    slots = target.slots[DENOISER].slots
    if len(loras) > slots:
        raise InvalidInputError(
            f"{len(loras)} LoRAs are more than the {slots} slot{'s' if slots > 1 else ''} of {bundle.path}; export it "
            f"with --lora-slots {len(loras)}"
        )
    found: Loras = {}
    for path, scale in loras.items():
        for graph, layers in _read(lora_file(path), checked_scale(path, scale), target).items():
            found.setdefault(graph, []).append(layers)
    return found


def lora_file(path: str | Path) -> Path:
    """Return the safetensors file of a LoRA that is named by it or by its folder."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise InvalidInputError(f"{path}: pickles can run arbitrary code and are not loaded; save it as safetensors")
    if path.is_dir():
        files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if len(files) != 1:
            raise InvalidInputError(f"{path}: has not one of {' and '.join(FOLDER_FILES)}; name the LoRA's file")
        return files[0]
    if not path.is_file():
        raise InvalidInputError(f"{path}: no such file (a LoRA is a .safetensors file or its folder)")
    return path


def split_scale(text: str) -> tuple[Path, float]:
    """Split 'PATH' or 'PATH:SCALE' into the path and the scale (default 1); PATH may contain colons."""
    head, _, tail = text.rpartition(":")
    try:
        return (Path(head), float(tail)) if head and not Path(text).exists() else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def parsed_loras(texts: Sequence[str]) -> dict[str | Path, float]:
    """Return LoRAs that are named as 'PATH' or 'PATH:SCALE' -> their scales.

    Raises:
        InvalidInputError: One is named twice.
    """
    found: dict[str | Path, float] = {}
    for text in texts:
        path, scale = split_scale(text)
        if path in found:
            raise InvalidInputError(f"--lora {text}: it is named twice; give each LoRA one scale")
        found[path] = scale
    return found


def lora_facts(loras: Mapping[str | Path, float]) -> str | None:
    """Return files, hashes and scales of LoRAs for the record of an image; None without any."""
    files = [(lora_file(path), scale) for path, scale in loras.items()]
    return ", ".join(f"{file.name}:{scale:g} sha256 {sha256(file)[:16]}" for file, scale in files) or None


def checked_scale(path: str | Path, scale: float) -> float:
    """Return the scale of a LoRA; raises InvalidInputError if it is not a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
        raise InvalidInputError(f"{path}: the scale {scale!r} is not a finite number")
    return float(scale)


def _target(bundle: Bundle) -> _Target:
    entries = {name: entry for name in bundle.manifest["graphs"] if (entry := bundle.slots(name))}
    component = str(entries[DENOISER]["component"])

    def named(layers: Mapping[str, Sequence[str]]) -> dict[str, Layer]:
        return stems(component, layers[DENOISER], {name: layers[name] for name in layers if name != DENOISER})

    every = named({name: [*entry["layers"], *entry["without"]] for name, entry in entries.items()})
    has_slot = {(name, layer) for name, entry in entries.items() for layer in entry["layers"]}
    return _Target(
        bundle,
        component,
        {name: Slots.of(entry) for name, entry in entries.items()},
        {stem: layer for stem, layer in every.items() if layer in has_slot},
        {stem: layer for stem, layer in every.items() if layer not in has_slot},
    )


def _read(file: Path, scale: float, target: _Target) -> dict[str, dict[str, Factors]]:
    """Return graph -> layer -> factors of one file, times `scale`."""
    tensors, metadata = read_safetensors(file)
    parts: dict[Layer, Parts] = {}
    for name, tensor in tensors.items():
        place, kind = _place(file, name, target)
        if kind in parts.setdefault(place, {}):
            raise InvalidInputError(f"{file}: '{parts[place][kind][0]}' and '{name}' are of the same layer; keep one")
        parts[place][kind] = name, tensor
    if not parts:
        raise InvalidInputError(f"{file}: contains no tensors; is it another kind of file?")
    configs = read_configs(file, metadata, target.component)
    found: dict[str, dict[str, Factors]] = {}
    for (graph, layer), own in parts.items():
        found.setdefault(graph, {})[layer] = _factors(
            file, own, target.slots[graph], layer, configs.get(graph, {}), scale
        )
    return found


def _factors(file: Path, parts: Parts, slots: Slots, layer: str, config: Mapping[str, Any], scale: float) -> Factors:
    """Return the factors of one layer in its own widths, with every scale in `up`."""
    lacking = next((kind for kind in (DOWN, UP) if kind not in parts), None)
    if lacking is not None:
        name = next(iter(parts.values()))[0]
        raise InvalidInputError(f"{file}: the '{lacking}' factor that belongs to '{name}' is missing; copy it again")
    fitted = _fitted(file, parts[DOWN][0], parts[DOWN][1], parts[UP][1], slots, layer)
    rank = len(fitted.down)
    scale *= _alpha(file, *parts[ALPHA]) / rank if ALPHA in parts else factor(file, config, layer, rank)
    with np.errstate(over="ignore"):
        found = Factors(fitted.down.astype(np.float32), fitted.up.astype(np.float32) * np.float32(scale))
    for kind, array in ((DOWN, found.down), (UP, found.up)):
        if not np.isfinite(array).all():
            raise InvalidInputError(f"{file}: tensor '{parts[kind][0]}' contains NaN or infinite values; it is broken")
    return found


def _place(file: Path, name: str, target: _Target) -> tuple[Layer, str]:
    """Return the layer that a tensor belongs to, and whether it is its down, up or alpha."""
    found = split_name(name)
    if found is None:
        raise InvalidInputError(
            f"{file}: tensor '{name}' is not part of a LoRA of two factors; fuse it before the export"
        )
    stem, kind = found
    if stem in target.stems:
        return target.stems[stem], kind
    if stem in target.without:
        raise InvalidInputError(
            f"{file}: tensor '{name}' changes layer '{target.without[stem][1]}', which has no slot in "
            f"{target.bundle.path}; export it with --lora-layers all"
        )
    raise InvalidInputError(
        f"{file}: tensor '{name}' fits no layer of {target.bundle.path}; is it a LoRA of another model?"
    )


def _fitted(file: Path, name: str, down: np.ndarray, up: np.ndarray, slots: Slots, layer: str) -> Factors:
    own = slots.layers[layer]
    if any(array.dtype.kind != "f" or array.ndim not in (2, 4) for array in (down, up)) or up.shape[2:] not in (
        (),
        (1, 1),
    ):
        raise InvalidInputError(f"{file}: tensor '{name}' and its pair are no float factors; copy the file again")
    fitted = own.fitted(Factors(down, up.reshape(up.shape[:2])))
    if fitted is None:
        raise InvalidInputError(
            f"{file}: tensor '{name}' {list(down.shape)} and its pair {list(up.shape)} do not fit the layer's weight "
            f"{list(own.shape)}; is it a LoRA of another model?"
        )
    if not 1 <= len(fitted.down) <= slots.rank:
        raise InvalidInputError(
            f"{file}: tensor '{name}' has rank {len(fitted.down)}, the slots have {slots.rank}; export the bundle with "
            f"--lora-rank {max(1, len(fitted.down))}"
        )
    return fitted


def _alpha(file: Path, name: str, array: np.ndarray) -> float:
    if array.size != 1 or not np.isfinite(array).all():
        raise InvalidInputError(f"{file}: tensor '{name}' is not one finite number; copy the file again")
    return float(array.reshape(()))
