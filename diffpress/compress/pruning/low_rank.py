"""`low_rank`: linear layers and convolutions become two of low rank, where an engine computes these faster.

    W [out, in] ~ U V, U [out, r], V [r, in]: the truncated singular value decomposition, which has the least squared
    error of all matrices of rank r, the sum of the squared singular values left out

The weight of a convolution is the matrix [out, in * kh * kw]. The rank r of each layer is the smallest that keeps
`energy` of the sum of its squared singular values, or what `ratio` leaves of its full rank, rounded up to `round_to`.

Fewer MACs are seldom as much less time: two products read and write more than one. So the network with all layers
replaced that would save MACs, r (in * kh * kw + out) < in * kh * kw * out, is profiled in the engine against the one
before. Layers of one shape (of weight, rank and input) are replaced if together they take less time, and the result is
timed as a whole. Without an engine all that save MACs are replaced.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context, EngineCosts
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.low_rank_layers import (
    WHOLE,
    LowRankLayer,
    empty_low_rank,
    full_rank,
    low_rank_layers,
    replace_layers_,
)
from diffpress.compress.progress import progress
from diffpress.compress.pruning.config import Engine, PruneLowRankConfig
from diffpress.compress.pruning.pruned import check_runs, unshare_
from diffpress.compress.pruning.sparsity import input_shapes
from diffpress.compress.quantization.layer_kinds import NOT_CALLED, unsupported
from diffpress.compress.quantization.layer_selection import check_ignored_layers, described, matches
from diffpress.runtime.engines import available
from diffpress.runtime.errors import InvalidInputError

logger = logging.getLogger(__name__)

MACS_RULE = "fewer MACs, r (in + out) < in out"
# profiles of the same kernel differ by a few percent, timings of the same network by less (export/verify/latency.py)
FASTER, SLOWER = 0.95, 1.02
LEAST_SCALE = 1e-6  # of the largest singular value: what balances the factors of smaller ones


class Candidates(NamedTuple):
    """The layers that low rank gives fewer MACs, with their factors, and why others stay whole."""

    layers: dict[str, LowRankLayer]
    whole: dict[str, str]


def prune_low_rank(checkpoint: Checkpoint, config: PruneLowRankConfig, ctx: Context) -> Checkpoint:
    """Replace the layers that are faster as two of low rank.

    Raises:
        InvalidInputError: A pattern matches no layer, no layer is faster, or `engine` is named and none is open.
    """
    engine = _engine(config, ctx)
    candidates = factored_layers(checkpoint, config)
    if engine is None:
        logger.warning(f"prune: no engine times the layers here: they are replaced for {MACS_RULE}")
        chosen, whole = candidates
        result = with_layers(checkpoint, chosen)
        ctx.notes["low_rank_rule"] = MACS_RULE
    else:
        assert ctx.open_engine_costs is not None
        with ctx.open_engine_costs(checkpoint, engine) as costs:
            chosen, slower = _faster(checkpoint, candidates.layers, costs, engine)
            whole = candidates.whole | slower
            result = with_layers(checkpoint, chosen)
            fraction = costs.relative_latency(result)
        if fraction > SLOWER:
            raise InvalidInputError(
                f"prune: a step with {len(chosen)} layers of low rank takes {fraction:.2f} of its time in {engine}; "
                "remove the stage, or remove more of the rank"
            )
        logger.info(f"prune: a step takes {fraction:.2f} of its time in {engine}")
        ctx.notes.update(low_rank_rule=f"less time in {engine}", latency_fraction=round(fraction, 4))
    if whole:
        logger.warning(f"prune: {len(whole)} layers left whole: {described(whole)}")
    ranks = {name: layer.rank for name, layer in chosen.items()}
    logger.info(
        f"prune: {len(ranks)} layers of low rank: {', '.join(f'{name} {rank}' for name, rank in ranks.items())}"
    )
    ctx.notes.update(low_rank_layers=ranks, whole_layers=whole)
    return result


def factored_layers(checkpoint: Checkpoint, config: PruneLowRankConfig) -> Candidates:
    """Return the layers that can be replaced with fewer MACs.

    Raises:
        InvalidInputError: A pattern matches no layer, or there are no such layers.
    """
    model = checkpoint.shared_model().eval()
    layers, whole = _choose_layers(model, checkpoint, config)
    found: dict[str, LowRankLayer] = {}
    with progress("singular values", len(layers)) as advance, torch.no_grad():
        for number, (name, layer) in enumerate(layers.items(), 1):
            rank, factors = _factored(layer, config)
            if factors is None:
                whole[name] = f"rank {rank} of {full_rank(layer)} saves no MACs"
            else:
                found[name] = factors
            advance(number, name)
    if not found:
        why = described(whole) or "all are sensitive or ignored"
        raise InvalidInputError(f"prune: no layer has fewer MACs with low rank: {why}")
    return Candidates(found, whole)


def with_layers(checkpoint: Checkpoint, layers: Mapping[str, LowRankLayer]) -> Checkpoint:
    """Return the checkpoint with these layers in the places of whole ones."""
    model = checkpoint.shared_model().eval()
    replace_layers_(model, layers)
    check_runs(model, dummy_inputs(checkpoint.spec, 2))
    unshare_(model, checkpoint.model)
    return checkpoint.evolve(model=model)


# --- factors -----------------------------------------------------------------------------------------------------


def _factored(layer: Any, config: PruneLowRankConfig) -> tuple[int, LowRankLayer | None]:
    """Return the rank that the settings give a layer, and its factors if they have fewer MACs."""
    matrix = layer.weight.detach().flatten(1).double()
    out, inputs = matrix.shape

    def rounded(rank: int) -> int:
        return min(math.ceil(rank / config.round_to) * config.round_to, full_rank(layer))

    def saves(rank: int) -> bool:
        return rank * (inputs + out) < inputs * out

    if config.ratio is not None:
        rank = rounded(max(1, round((1 - config.ratio) * full_rank(layer))))
        if not saves(rank):
            return rank, None
    energies, basis = singular_vectors(matrix)
    if config.energy is not None:
        kept = energies.cumsum(0) >= config.energy * energies.sum()
        rank = rounded(int(kept.int().argmax()) + 1)
    return rank, factors_of(layer, energies, basis, rank) if saves(rank) else None


def singular_vectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared singular values [k] of a matrix, descending, and the singular vectors of its shorter side.

    They are the eigenvalues and eigenvectors of its Gram matrix, found in a seventh of the time of torch.linalg.svd for
    a convolution of Stable Diffusion. In float64 they are as exact as a decomposition in float32.
    """
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    energies, vectors = torch.linalg.eigh(gram)
    return energies.flip(0).clamp_min(0.0), vectors.flip(1)


def factors_of(layer: Any, energies: torch.Tensor, basis: torch.Tensor, rank: int) -> LowRankLayer:
    """Return the truncated decomposition of a layer: its projection on the first singular vectors.

    Both factors are scaled by the roots of the singular values, so that they have equal norms, as training and rounding
    need them.
    """
    matrix, kept = layer.weight.detach().flatten(1).double(), basis[:, :rank]
    singular = energies[:rank].sqrt()
    scale = singular.clamp_min(max(LEAST_SCALE * float(singular[0]), torch.finfo(torch.float32).tiny)).sqrt()
    if len(matrix) <= matrix.shape[1]:
        up, down = kept * scale, (kept.T @ matrix) / scale[:, None]
    else:
        up, down = (matrix @ kept) / scale, kept.T * scale[:, None]
    found = empty_low_rank(layer, rank)
    found.down.weight.copy_(down.view_as(found.down.weight))
    found.up.weight.copy_(up.view_as(found.up.weight))
    if layer.bias is not None:
        found.bias.copy_(layer.bias)
    return found


# --- choice ------------------------------------------------------------------------------------------------------


def _choose_layers(
    model: nn.Module, checkpoint: Checkpoint, config: PruneLowRankConfig
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the layers to decompose, and why others that are not sensitive or ignored stay whole."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WHOLE)}
    check_ignored_layers(model, layers, config.ignored_layers, "prune")
    sensitive, called = set(adapter_for(model).sensitive_layers(model)), input_shapes(layers, model, checkpoint)
    factors, uses = tuple(f"{name}." for name in low_rank_layers(model)), _uses(model)
    chosen, whole = {}, {}
    for name, layer in layers.items():
        if name in sensitive or any(matches(name, pattern) for pattern in config.ignored_layers):
            continue
        if name.startswith(factors):
            whole[name] = "it is a factor of a layer of low rank"
        elif reason := _kept_whole(layer, uses) if name in called else NOT_CALLED:
            whole[name] = reason
        else:
            chosen[name] = layer
    return chosen, whole


def _kept_whole(layer: Any, uses: Mapping[int, int]) -> str:
    """Return why a layer cannot be replaced; '' if it can."""
    if reason := unsupported(layer):
        return reason
    if type(layer) not in WHOLE or any(vars(layer)[kind] for kind in ("_forward_hooks", "_forward_pre_hooks")):
        return "it is more than torch's layer"
    if getattr(layer, "groups", 1) != 1:
        return "its channels are in groups"
    return "it is shared" if max(uses[id(layer)], uses[id(layer.weight)]) > 1 else ""


def _uses(model: nn.Module) -> dict[int, int]:
    """Return the id of every module and parameter -> the number of modules that hold it."""
    held = [value for module in model.modules() for value in (*module._modules.values(), *module._parameters.values())]
    found: dict[int, int] = {}
    for value in held:
        found[id(value)] = found.get(id(value), 0) + 1
    return found


def _engine(config: PruneLowRankConfig, ctx: Context) -> str | None:
    """Return the engine in which layers are timed; None if there is none."""
    if ctx.open_engine_costs is None:
        if config.engine is not None:
            raise InvalidInputError(
                f"prune: engine = '{config.engine}' is where layers are timed, and none is open here; remove engine"
            )
        return None
    installed = available()
    return config.engine or next((name for name in get_args(Engine) if name in installed), None)


def _faster(
    checkpoint: Checkpoint, layers: Mapping[str, LowRankLayer], costs: EngineCosts, engine: str
) -> tuple[dict[str, LowRankLayer], dict[str, str]]:
    """Return the layers that take less time in the engine than the whole ones, and why others stay whole.

    Raises:
        InvalidInputError: None does; the message names the best.
    """
    before, after = costs.layer_times_ms(with_layers(checkpoint, layers))
    model = checkpoint.shared_model().eval()
    inputs = input_shapes({name: model.get_submodule(name) for name in layers}, model, checkpoint)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in layers.items():
        shape = (type(layer.down), *layer.down.weight.shape, len(layer.up.weight), layer.down.__dict__.get("stride"))
        groups.setdefault((*shape, inputs[name]), []).append(name)
    fractions: dict[str, float] = {}
    for names in groups.values():
        times = [(before.get(name), after.get(f"{name}.down"), after.get(f"{name}.up")) for name in names]
        # a layer that a profile does not show, because it is part of another kernel, does not count
        shown = [(whole, down + up) for whole, down, up in times if whole and down and up]
        fraction = sum(factors for _, factors in shown) / sum(whole for whole, _ in shown) if shown else math.inf
        fractions |= dict.fromkeys(names, fraction)
    chosen = {name: layer for name, layer in layers.items() if fractions[name] < FASTER}
    if not chosen:
        best = min(fractions, key=fractions.__getitem__)
        found = f"takes {fractions[best]:.2f} of its time" if math.isfinite(fractions[best]) else "is in no profile"
        raise InvalidInputError(
            f"prune: no layer is faster in {engine} with low rank: the best, '{best}' with rank {layers[best].rank}, "
            f"{found}; remove the stage, or remove more of the rank"
        )
    return chosen, {name: f"not faster in {engine}" for name in layers if name not in chosen}
