"""What each operation does to the channel ids of its operands: one rule per kind of operation, in one table.

An operation without a rule fixes the channels that it reads. Removing a channel must be exact: it leaves out the
products with the channel's outgoing weights and nothing else. So a sum over channels is allowed if it is a product with
weights, or a statistic of a normalization, which is then taken over the channels that are kept.

Names are those of ATen's operations: modules and functions of torch consist of these.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch

from diffpress.compress.pruning.channel_ids import HARD, Arguments, Ids, Rule, Trace, tensors_in
from diffpress.compress.pruning.channel_movement import (
    concatenation,
    constant_pad,
    movement,
    pixel_shuffle,
    spatial,
    table_lookup,
)


def elementwise(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Couple the operands, whose dimensions align from the right; a dimension of size 1 is broadcast."""
    operands = [a for a in tensors_in(arguments.values()) if a.ndim > 0]
    axes: dict[int, Ids] = {}
    for dim, size in enumerate(outputs[0].shape):
        rows = []
        for operand in operands:
            own = dim - outputs[0].ndim + operand.ndim
            if own >= 0 and operand.shape[own] == size:
                rows.append(trace.labels(operand).axes.get(own))
        if any(row is not None for row in rows):
            merged = trace.ids.couple_all(rows, f"is combined with a tensor of fixed size ({name})")  # type: ignore[arg-type]
            if merged is not None:
                axes[dim] = merged
    return [axes for _ in outputs]


def first_operand(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Give the output the axes of the first operand, whose shape it has."""
    return [trace.labels(next(iter(tensors_in(arguments.values())))).axes for _ in outputs]


def convolution(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Couple the input channels with the weight's columns; the output channels are the weight's rows."""
    x, weight, bias, groups = (arguments[key] for key in ("input", "weight", "bias", "groups"))
    axes, columns, rows = trace.labels(weight).axes, *((0, 1) if arguments["transposed"] else (1, 0))
    for dim in range(2, x.ndim):
        trace.ids.fix(axes.get(dim), "is a kernel dimension")
        trace.ids.fix(trace.labels(x).axes.get(dim), "is a spatial dimension")
    per_group = weight.shape[1]
    out = axes.get(rows)
    if groups == 1:
        _multiply(trace, x, 1, weight, columns)
    elif arguments["transposed"] and per_group == 1:
        out = trace.ids.couple(trace.labels(x).axes.get(1), axes.get(0), "is read by a depthwise convolution")
    elif arguments["transposed"]:
        for ids in (trace.labels(x).axes.get(1), *axes.values()):
            trace.ids.fix(ids, "is in a grouped transposed convolution")
        out = None
    elif per_group == 1 and axes.get(0) is not None:  # depthwise: output o reads input o // (outputs per input)
        inputs = trace.labels(x).axes.get(1)
        repeated = None if inputs is None else np.repeat(inputs, weight.shape[0] // groups)
        trace.ids.couple(repeated, axes[0], "is read by a depthwise convolution")
    else:
        inputs = trace.labels(x).axes.get(1)
        inputs = np.full(x.shape[1], HARD) if inputs is None else inputs
        shared = [*inputs.reshape(groups, per_group), axes.get(1, np.full(per_group, HARD))]
        trace.ids.couple_all(shared, "is read by a grouped convolution")
        trace.equal_share(axes.get(0), groups, "a grouped convolution")
    if bias is not None:
        out = trace.ids.couple(out, trace.labels(bias).axes.get(0), "has a bias of fixed size")
    read_at = x if arguments["transposed"] else outputs[0]
    trace.evaluates(trace.labels(weight).weights, read_at.shape[0] * read_at.shape[2:].numel())
    first = {0: trace.labels(x).axes[0]} if 0 in trace.labels(x).axes else {}
    return [first | ({} if out is None else {1: out})]


def matrix_product(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Couple the summed dimension of two matrices; for bmm also the batch dimension."""
    *bias, one, two = (a for a in arguments.values() if isinstance(a, torch.Tensor))
    summed = max(two.ndim - 2, 0)
    _multiply(trace, one, one.ndim - 1, two, summed)
    first, second = trace.labels(one).axes, trace.labels(two).axes
    axes = {dim: ids for dim, ids in first.items() if dim < one.ndim - 1}
    if two.ndim > 1 and two.ndim - 1 in second:
        axes[outputs[0].ndim - 1] = second[two.ndim - 1]
    if two.ndim == 3 and (0 in first or 0 in second):
        merged = trace.ids.couple(first.get(0), second.get(0), f"is combined with a tensor of fixed size ({name})")
        if merged is not None:
            axes[0] = merged
    trace.evaluates(trace.labels(one).weights, two.numel() // two.shape[summed])
    trace.evaluates(trace.labels(two).weights, one.numel() // one.shape[-1])
    for operand in bias:
        axes = _added(trace, axes, operand, outputs[0].ndim)
    return [axes]


def _added(trace: Trace, axes: dict[int, Ids], bias: torch.Tensor, ndim: int) -> dict[int, Ids]:
    for dim, ids in trace.labels(bias).axes.items():
        merged = trace.ids.couple(axes.get(dim + ndim - bias.ndim), ids, "has a bias of fixed size")
        axes = axes if merged is None else {**axes, dim + ndim - bias.ndim: merged}
    return axes


def _multiply(trace: Trace, one: torch.Tensor, dim_one: int, two: torch.Tensor, dim_two: int) -> None:
    """Couple a dimension that a product sums over; a product of two activations sums over fixed channels."""
    first, second = trace.labels(one), trace.labels(two)
    if first.data and second.data:
        for labels, dim in ((first, dim_one), (second, dim_two)):
            trace.ids.fix(labels.axes.get(dim), "is summed in a product of activations, as in attention")
    else:
        trace.ids.couple(first.axes.get(dim_one), second.axes.get(dim_two), "meets a matrix of fixed size")


def layer_norm(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Couple the normalized dimensions with weight and bias."""
    x, axes = arguments["input"], dict(trace.labels(arguments["input"]).axes)
    for operand in (arguments["weight"], arguments["bias"]):
        if operand is not None:
            for dim in range(operand.ndim):
                own = dim + x.ndim - operand.ndim
                scale = trace.labels(operand).axes.get(dim)
                merged = trace.ids.couple(axes.get(own), scale, "is normalized with a weight of fixed size")
                axes |= {} if merged is None else {own: merged}
    return [axes, {}, {}]


def channel_norm(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Couple the channels of a group or batch normalization with its vectors."""
    axes = dict(trace.labels(arguments["input"]).axes)
    for key in ("weight", "bias", "running_mean", "running_var"):
        if arguments.get(key) is not None:
            vector = trace.labels(arguments[key]).axes.get(0)
            merged = trace.ids.couple(axes.get(1), vector, "is normalized with a weight of fixed size")
            axes |= {} if merged is None else {1: merged}
    trace.equal_share(axes.get(1), arguments.get("group", 1), "a group normalization")
    # batch statistics, if any, are per channel; those of a group normalization are per group
    vectors = {0: axes[1]} if 1 in axes and name == "native_batch_norm" else {}
    return [axes, *(vectors if out.numel() > 0 else {} for out in outputs[1:])]


def weight_norm(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Couple direction v and magnitude g along the dimension that keeps its own norm."""
    axes, dim = dict(trace.labels(arguments["v"]).axes), arguments["dim"] % arguments["v"].ndim
    merged = trace.ids.couple(axes.get(dim), trace.labels(arguments["g"]).axes.get(dim), "has a norm of fixed size")
    own = {} if merged is None else {dim: merged}
    return [axes | own, own]


def gated(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Couple the two halves of a gated linear unit."""
    x = next(iter(tensors_in(arguments.values())))
    axes, dim = dict(trace.labels(x).axes), arguments["dim"] % x.ndim
    if dim in axes:
        axes[dim] = trace.ids.couple_all(np.split(axes[dim], 2), "is gated by a tensor of fixed size")  # type: ignore[assignment]
    return [axes]


def embedding(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Return rows of a table; which rows exist is fixed."""
    axes = trace.labels(arguments["weight"]).axes
    trace.ids.fix(axes.get(0), "is selected by its index (embedding)")
    return [{outputs[0].ndim - 1: axes[1]} if 1 in axes else {}]


def along_dimension(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Fix the dimension over which softmax and cumulative sums depend on every entry."""
    x = next(iter(tensors_in(arguments.values())))
    axes, dim = dict(trace.labels(x).axes), arguments["dim"] % x.ndim
    trace.ids.fix(axes.pop(dim, None), f"is summed over ({name})")
    return [axes for _ in outputs]


def reduction(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Drop the reduced dimensions; sums over channels are the statistics of a normalization (see `statistics_of`)."""
    x, axes = next(iter(tensors_in(arguments.values()))), {}
    dims = _reduced(arguments, x.ndim)
    keep = outputs[0].ndim == x.ndim
    for dim, ids in trace.labels(x).axes.items():
        if dim not in dims:
            axes[dim if keep else dim - sum(other < dim for other in dims)] = ids
        elif name not in STATISTICS:
            trace.ids.fix(ids, f"is reduced over ({name})")
    return [dict(axes) for _ in outputs]


def statistics_of(trace: Trace, name: str, arguments: Arguments) -> tuple[Ids, ...]:
    """Return the ids over which a reduction makes a statistic."""
    if name not in STATISTICS:
        return ()
    x = next(iter(tensors_in(arguments.values())))
    return tuple(ids for dim, ids in trace.labels(x).axes.items() if dim in _reduced(arguments, x.ndim))


def _reduced(arguments: Arguments, ndim: int) -> set[int]:
    dims = arguments.get("dim")
    dims = range(ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return {dim % ndim for dim in dims}


def indexing(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Index with tensors of integers; a mask selects a number of entries that depends on the data."""
    masks = any(index is not None and index.dtype == torch.bool for index in arguments["indices"])
    return (unknown if masks else table_lookup)(trace, name, arguments, outputs)


def unknown(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Fix everything that an operation without a rule reads."""
    for operand in tensors_in(arguments.values()):
        for ids in trace.labels(operand).axes.values():
            trace.ids.fix(ids, f"is read by an operation that pruning does not follow ({name})")
    return [{} for _ in outputs]


# a reduction over channels that a normalization uses
STATISTICS = frozenset(["mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm"])
# what may be done with a statistic before it meets the channels again
ON_STATISTICS = frozenset(
    name
    for names in (
        ("add", "sub", "rsub", "mul", "div", "pow", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "square", "mean"),
        ("clamp", "clamp_min", "maximum", "clone", "detach", "alias", "_to_copy"),
        ("expand", "view", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose"),
    )
    for name in names
)
RULES: dict[str, Rule] = {
    name: rule
    for names, rule in (
        ("_prelu_kernel hardswish hardsigmoid _to_copy alias detach lift_fresh copy native_dropout", elementwise),
        ("zeros_like ones_like empty_like full_like rand_like randn_like", first_operand),
        (
            "view _unsafe_view permute transpose t expand unsqueeze squeeze slice select split split_with_sizes "
            "unsafe_split unsafe_split_with_sizes unbind repeat flip roll index_select",
            movement,
        ),
        ("cat stack", concatenation),
        ("convolution", convolution),
        ("mm addmm bmm baddbmm mv dot vdot", matrix_product),
        ("native_layer_norm", layer_norm),
        ("native_group_norm native_batch_norm", channel_norm),
        ("_weight_norm_interface", weight_norm),
        ("glu", gated),
        ("embedding", embedding),
        ("_softmax _log_softmax _safe_softmax cumsum logcumsumexp", along_dimension),
        ("mean sum var std var_mean std_mean linalg_vector_norm norm amax amin max min prod logsumexp", reduction),
        (
            " ".join(
                [f"{kind}{n}d" for kind, n in product(("avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool"), "123")]
                + [f"{kind}{n}d" for kind, n in product(("reflection_pad", "replication_pad"), "123")]
                + [f"{kind}_pool{n}d_with_indices" for kind, n in product(("max", "adaptive_max"), "23")]
                + [f"adaptive_max_pool{n}d" for n in "23"]
                + [f"upsample_nearest{n}d" for n in "123"]
                + [f"_upsample_nearest_exact{n}d" for n in "123"]
                + ["upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"]
                + ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
            ),
            spatial,
        ),
        ("constant_pad_nd", constant_pad),
        ("pixel_shuffle pixel_unshuffle", pixel_shuffle),
        ("index", indexing),
    )
    for name in names.split()
}


def rule_for(function: Any, name: str) -> Rule:
    """Return the rule of an ATen operation."""
    rule = RULES.get(name)
    if function._overloadname == "dtype" or (rule is movement and function._schema.is_mutable):
        return unknown  # a view of the bytes; a view in place, whose operand has changed already
    if rule is not None:
        return rule
    return elementwise if torch.Tag.pointwise in function.tags else unknown
