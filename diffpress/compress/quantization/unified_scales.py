"""Unified scales: the residual sums of a U-Net are quantized, and concatenated tensors share a scale.

    x' = q(x + branch(x))             the next block, the skip and the up- or downsampling read 8 bits
    cat(q_s(a), q_s(b))               with one scale s for a and b, an engine copies integers

A class of tensors shares one scale: a and b of every concatenation, the result of the concatenation or of an
upsampling, and the inputs of layers that read one of these unchanged. The amax of a class is the largest of its
members.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from diffpress.compress.quantization.layer_graph import LayerGraph

Scales = dict[str, torch.Tensor]


def unify_scales(graph: LayerGraph, amax: Mapping[str, torch.Tensor]) -> Scales:
    """Return `amax` ('<module>.output', '<layer>.input', ...) with every value set to the largest of its class.

    A concatenation with a tensor that is not quantized unifies nothing.
    """
    found = dict(amax)
    for keys in _classes(graph, amax):
        found |= dict.fromkeys(keys, torch.stack([amax[key] for key in keys]).amax(0))
    return found


def _classes(graph: LayerGraph, amax: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Return the classes of keys that share a scale, by union-find over the events."""
    names: dict[int, str] = {}  # tensor -> one member of its class
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents[name] != name:
            name = parents[name]
        return name

    def unite(a: str, b: str) -> None:
        parents.setdefault(a, a)
        parents.setdefault(b, b)
        parents[root(b)] = root(a)

    for key, tensor, sources in graph.events:
        if sources:
            if all(source in names for source in sources):
                names[tensor] = names[sources[0]]
                for source in sources:
                    unite(names[tensor], names[source])
        elif key in amax and key.endswith(".output"):
            names[tensor] = key
        elif key in amax and tensor in names:
            unite(names[tensor], key)
    classes: dict[str, list[str]] = {}
    for name in parents:
        classes.setdefault(root(name), []).append(name)
    return list(classes.values())
