"""Multiply-accumulates (MACs) of the kernels an engine executed, from their actual shapes.

convolution             numel(out) * numel(weights) / channels_out        groups are in the weights' shape
transposed convolution  numel(in) * numel(weights) / channels_in
matrix product          numel(A) * N             for A [..., M, K] in any memory layout
attention               queries * keys * (width of K + width of V) * heads * batch
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Shape = Sequence[int]


def convolution(out: Shape, weights: Shape) -> int:
    """MACs of a convolution with `weights` [O, I/g, ...] or [g, O/g, I/g, ...]."""
    spatial = len(out) - 2
    filters = prod(weights[: len(weights) - spatial - 1])
    return prod(out) * prod(weights) // filters


def transposed_convolution(inputs: Shape, weights: Shape) -> int:
    """MACs of a transposed convolution with `weights` [I, O/g, ...] or [g, I/g, O/g, ...]."""
    spatial = len(inputs) - 2
    return prod(inputs) * prod(weights) // prod(weights[: len(weights) - spatial - 1])


def product(a: Shape, out: Shape) -> int:
    """MACs of a matrix product A [..., M, K] B = `out` [..., M, N]; A is not broadcast over the batch.

    B may be a vector: then N is 1 and `out` has one dimension less than A.
    """
    return prod(a) * (out[-1] if len(out) >= len(a) else 1)


def attention(query: Shape, key: Shape, value: Shape) -> int:
    """MACs of attention: Q [..., S, D], K [..., L, D], V [..., L, E]; heads are leading axes or inside D and E."""
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
