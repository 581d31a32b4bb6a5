"""Slots of a graph for LoRAs: a branch of low rank beside each layer, whose factors are inputs of the graph.

    y = layer(x) + (x down) up          lora.down.<layer> [in, R],            lora.up.<layer> [R, out]
    a convolution                       lora.down.<layer> [R, in, kh, kw],    lora.up.<layer> [out, R, 1, 1]

R = slots * rank: LoRA number i occupies the rows from i * rank on, and rows of zeros add nothing. Engines hold these
inputs (`engine.lora`, zeros when opened), so that a step does not copy them. The manifest lists the layers:

    {"file": "denoiser.lora.onnx", "slots": 2, "rank": 32,
     "layers": {"mid_block...to_q": {"shape": [40, 64], "kept": {"0": "0-39"}, "unpruned": [48, 64]}}}

`kept` are the indices that a pruned layer kept of the unpruned one: LoRAs of the unpruned layout are cut by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PREFIX = "lora."
DOWN, UP = f"{PREFIX}down.", f"{PREFIX}up."


@dataclass(frozen=True)
class Factors:
    """What a LoRA adds to a layer's weight: up @ down, the scale included.

    Attributes:
        down: float32 [rank, in] or [rank, in, kh, kw].
        up: float32 [out, rank].
    """

    down: np.ndarray
    up: np.ndarray


@dataclass(frozen=True)
class SlotLayer:
    """A layer with slots.

    Attributes:
        shape: Shape of its weight, [out, in] or [out, in, kh, kw].
        unpruned: Its [out, in] before pruning.
        kept: Dimension (0 for out, 1 for in) -> indices that it kept of the unpruned layer, increasing.
    """

    shape: tuple[int, ...]
    unpruned: tuple[int, int]
    kept: Mapping[int, np.ndarray] = field(default_factory=dict)

    def fitted(self, factors: Factors) -> Factors | None:
        """Return the factors for this layer's widths, cut if they are those of the unpruned layer; None if neither."""
        kernel = self.shape[2:]
        down, up = factors.down, factors.up
        if down.shape[2:] == (1, 1) and not kernel:
            down = down[:, :, 0, 0]
        elif down.ndim == 2 and kernel == (1, 1):
            down = down[:, :, None, None]
        widths = (up.shape[0], down.shape[1])
        if down.shape[2:] != kernel or up.shape[1] != down.shape[0]:
            return None
        if widths == self.shape[:2]:
            return Factors(down, up)
        if widths != self.unpruned:
            return None
        if 0 in self.kept:
            up = up[self.kept[0]]
        if 1 in self.kept:
            down = down[:, self.kept[1]]
        return Factors(down, up)


@dataclass(frozen=True)
class Slots:
    """The slots of one graph."""

    slots: int
    rank: int
    layers: Mapping[str, SlotLayer]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Slots:
        """Read the manifest's entry `lora` of a graph."""
        layers = {name: _layer(layer) for name, layer in entry["layers"].items()}
        return cls(int(entry["slots"]), int(entry["rank"]), layers)


def lora_arrays(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Return zeros, float32, for those of a graph's inputs (name -> shape) that are slots."""
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name.startswith((DOWN, UP))}


def fill_(arrays: Mapping[str, np.ndarray], rank: int, loras: Iterable[Mapping[str, Factors]]) -> None:
    """Write LoRAs (layer -> factors that fit) into a graph's arrays in place; what they leave over becomes zero."""
    for array in arrays.values():
        array[...] = 0.0
    for index, lora in enumerate(loras):
        for layer, (down, up) in ((name, (one.down, one.up)) for name, one in lora.items()):
            rows = slice(index * rank, index * rank + len(down))
            if down.ndim == 2:
                arrays[f"{DOWN}{layer}"][:, rows] = down.T
                arrays[f"{UP}{layer}"][rows] = up.T
            else:
                arrays[f"{DOWN}{layer}"][rows] = down
                arrays[f"{UP}{layer}"][:, rows, 0, 0] = up


def _layer(entry: Mapping[str, Any]) -> SlotLayer:
    shape = tuple(int(side) for side in entry["shape"])
    out, width = entry.get("unpruned", shape[:2])
    kept = {int(dim): _indices(text) for dim, text in entry.get("kept", {}).items()}
    return SlotLayer(shape, (int(out), int(width)), kept)


def _indices(text: str) -> np.ndarray:
    """Read ranges of indices: '0-3 5 8-15'."""
    ends = [(int(run.split("-")[0]), int(run.split("-")[-1])) for run in text.split()]
    return np.concatenate([np.arange(first, last + 1) for first, last in ends])
