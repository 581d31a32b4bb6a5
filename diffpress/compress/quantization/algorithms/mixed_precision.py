"""Mixed precision by measurement: which layers go back to float, so that a quantized model keeps its bounds.

    order(p) = noise(p) / gain(p)      noise removed per millisecond given up (per byte, where the size is in the way)
    S_k      = the k first places by it, in float; the others in their formats

A place is a layer, or the sum of a block. Its noise (compress/quantization/algorithms/sensitivity.py) and its gain (its time in
the float graph less that in the quantized one, in the target engine) only order. The bounds are held by what is
measured on S_k as a whole: its SQNR on states of the trajectory, its step against the float graph's, its file, the
Fréchet distance of its samples against the float model's.

    min_sqnr_db, max_frechet_ratio     say how much noise is allowed: the smallest k that keeps them, by bisection
    max_latency_ratio, max_size_mib    must then hold too; given without the others, the largest k that keeps them

Bisection takes quality and cost to grow with k, which measurements do but for their noise; at the k it finds every
bound has been measured. Where some cannot be kept together the stage fails as a gate does, and says by how much. Mode
qat trains what was chosen so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from diffpress.compress.builtin import FEATURES, REFERENCE
from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.config import BoundsConfig, EvaluateConfig, QuantizeConfig
from diffpress.compress.context import Context, EngineCosts, say
from diffpress.compress.evaluation.evaluate import evaluate
from diffpress.compress.evaluation.features import load_features, load_reference
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.counts import is_large
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.algorithms.sensitivity import States, decibels, noise_by_layer, quantized_layers
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.runtime.engines import available
from diffpress.runtime.errors import GateFailedError, InvalidInputError, MissingDependencyError
from diffpress.runtime.network_inputs import Network
from diffpress.runtime.spec import DenoiserSpec

FRECHET = EvaluateConfig(samples=128, seeds=1)

# a gain counts for at least this share of all gains: what costs nothing is not taken before what helps
LEAST_GAIN = 1e-3

Measure = Callable[[int], float]


def check_bounds(config: QuantizeConfig, spec: DenoiserSpec, has_engines: bool) -> None:
    """Raise InvalidInputError or MissingDependencyError for bounds that cannot be measured; `has_engines` says whether a run has any."""
    bounds = config.bounds
    if bounds is None:
        return
    if bounds.max_frechet_ratio is not None:
        load_features(FEATURES, spec)
    if has_engines and config.target not in available():
        raise MissingDependencyError(config.target, config.target, f"quantize: target {config.target}")
    if not has_engines:
        _refuse_engine_bounds(bounds, "and none is given here")


def _refuse_engine_bounds(bounds: BoundsConfig, why: str) -> None:
    for name in ("max_latency_ratio", "max_size_mib"):
        if getattr(bounds, name) is not None:
            raise InvalidInputError(f"quantize: bounds: {name} is measured in an engine, {why}; leave it out")


def mix(checkpoint: Checkpoint, scales: Quantization, config: QuantizeConfig, ctx: Context) -> Quantization:
    """`scales` of the float `checkpoint` without those of the places that its bounds want in float.

    What was measured goes into the context's notes as 'mixed'. Raises GateFailedError where the bounds contradict each
    other, and InvalidInputError for a bound that cannot be measured here.
    """
    assert config.bounds is not None
    bounds, quantized = config.bounds, checkpoint.evolve(quantization=scales)
    with _costs(checkpoint, config, ctx) as costs:
        frechet = _frechet(checkpoint, bounds, costs)  # first, for it refuses what it cannot score
        states = States(checkpoint, config, ctx)
        noise = noise_by_layer(quantized, states, ctx)
        gains = _macs(checkpoint, scales) if costs is None else costs.gains_ms(scales)
        sizes = {layer: _bytes_saved(checkpoint, scales, layer) for layer in noise}
        tried = []
        for worth in (gains, sizes) if bounds.max_size_mib is not None else (gains,):
            trial = _Trial(quantized, _ordered(noise, worth), states, costs, frechet)
            tried.append((trial, _chosen(trial, bounds)))
            if not _broken(trial, tried[-1][1], bounds):
                break
        # where no order keeps all the bounds, the first one's failure is told
        trial, k = tried[-1] if not _broken(*tried[-1], bounds) else tried[0]
        figures = {"all_quantized": trial.figures(0), "chosen": trial.figures(k)}
        broken = _broken(trial, k, bounds)
    unit = "macs" if costs is None else "gain_ms"
    rows = {
        layer: {"sqnr_db": round(decibels(noise[layer]), 2), unit: round(gains[layer], 4), "bytes": int(sizes[layer])}
        for layer in sorted(noise, key=lambda layer: -noise[layer])
    }
    kept = trial.order[:k]
    ctx.notes["mixed"] = {"target": config.target, "in_float": kept, **figures, "places": rows}
    say(f"{k} of {len(noise)} quantized layers and sums go back to float: {_words(figures['chosen'])}")
    if broken:
        raise GateFailedError(
            f"quantize: bounds: with {k} of {len(noise)} layers and sums in float "
            f"(first {', '.join(kept[:3]) or 'none'}) {'; '.join(broken)}; "
            f"all quantized: {_words(figures['all_quantized'])}. Loosen one of them"
        )
    return trial.scales(k)


class _Trial:
    """What is measured with the first k places of `order` in float, each k once."""

    def __init__(
        self,
        quantized: Checkpoint,
        order: list[str],
        states: States,
        costs: EngineCosts | None,
        frechet: Callable[[Quantization], float] | None,
    ) -> None:
        self.order = order
        self._quantized, self._states, self._costs = quantized, states, costs
        self.measures: dict[str, Measure] = {"sqnr_db": cache(self._sqnr_db)}
        if costs is not None:
            self.measures["latency_ratio"] = cache(lambda k: costs.latency_ratio(self.scales(k)))
            self.measures["size_mib"] = cache(lambda k: costs.size_mib(self.scales(k)))
        if frechet is not None:
            self.measures["frechet_ratio"] = cache(lambda k: frechet(self.scales(k)))

    def scales(self, k: int) -> Quantization:
        assert self._quantized.quantization is not None
        return self._quantized.quantization.without(self.order[:k])

    def figures(self, k: int) -> dict[str, float]:
        return {name: round(measure(k), 4) for name, measure in self.measures.items()}

    def _sqnr_db(self, k: int) -> float:
        return decibels(self._states.noise(fake_quantized(self._quantized.evolve(quantization=self.scales(k)))))


def _chosen(trial: _Trial, bounds: BoundsConfig) -> int:
    """How many places of the trial's order go back to float; see the top of this file."""
    most, k = len(trial.order), 0
    measure = trial.measures
    if bounds.min_sqnr_db is None and bounds.max_frechet_ratio is None:
        # with nothing asked of the quality, all of it that the costs allow
        return most - smallest(0, most, lambda back: not _broken(trial, most - back, bounds))
    if (least := bounds.min_sqnr_db) is not None:
        k = smallest(k, most, lambda k: measure["sqnr_db"](k) >= least)
    if (largest := bounds.max_frechet_ratio) is not None:
        k = smallest(k, most, lambda k: measure["frechet_ratio"](k) <= largest)
    return k


def smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest k in low..high from which on `holds` is true, by bisection; `high` where it is true nowhere."""
    if holds(low):
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _broken(trial: _Trial, k: int, bounds: BoundsConfig) -> list[str]:
    """What is wrong with k places in float, in words: the bounds that are not kept."""
    found = ["nothing would be left in low precision"] if k == len(trial.order) else []
    for name, bound in bounds.model_dump().items():
        side, _, what = name.partition("_")
        if bound is None:
            continue
        value = trial.measures[what](k)
        if value < bound if side == "min" else value > bound:
            found.append(f"{what} is {value:.4g}, {name} is {bound:g}")
    return found


def _ordered(noise: Mapping[str, float], worth: Mapping[str, float]) -> list[str]:
    """Places by the noise they bring for what quantizing them is worth, the largest first."""
    floor = LEAST_GAIN * sum(max(value, 0.0) for value in worth.values()) or 1.0
    return sorted(noise, key=lambda layer: (-noise[layer] / max(worth[layer], floor), layer))


@contextmanager
def _costs(checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> Iterator[EngineCosts | None]:
    assert config.bounds is not None
    if ctx.costs_in is not None and not is_large(checkpoint.model):
        with ctx.costs_in(checkpoint, config.target) as costs:
            yield costs
        return
    if ctx.costs_in is not None:
        _refuse_engine_bounds(config.bounds, "and the model is too large to be timed here")
    say("not timed in an engine: what a layer gains is taken to be its MACs")
    yield None


def _frechet(
    checkpoint: Checkpoint, bounds: BoundsConfig, costs: EngineCosts | None
) -> Callable[[Quantization], float] | None:
    """The Fréchet distance of a quantization's samples over that of the float model's, from the same noise."""
    if bounds.max_frechet_ratio is None:
        return None
    spec = checkpoint.spec
    features = load_features(FEATURES, spec)
    reference = load_reference(REFERENCE, features, spec)

    @contextmanager
    def opened(quantization: Quantization | None) -> Iterator[Network]:
        if costs is not None:
            with costs.network(quantization) as network:
                yield network
        else:
            yield TorchNetwork(fake_quantized(checkpoint.evolve(quantization=quantization)), spec)

    def distance(quantization: Quantization | None) -> float:
        with opened(quantization) as network:
            found = evaluate(network, spec, FRECHET, features, reference, what="sampling for max_frechet_ratio")
        return float(found["frechet"]["mean"])

    exact = distance(None)
    return lambda quantization: distance(quantization) / exact


def _macs(checkpoint: Checkpoint, scales: Quantization) -> dict[str, float]:
    """Place -> multiply-accumulates of one sample that it does in few bits."""
    found, hooks = dict.fromkeys(quantized_layers(scales), 0.0), []
    model = checkpoint.shared_model()

    def see(name: str, layer: nn.Module, out: torch.Tensor) -> None:
        weight: Any = layer.weight
        found[name] += out.numel() * weight.numel() / weight.shape[0]

    for name in scales.layers:
        if f"{name}.input" in scales.amax:
            layer = model.get_submodule(name)
            hooks.append(layer.register_forward_hook(lambda layer, _, out, name=name: see(name, layer, out)))
    with torch.no_grad():
        adapter_for(model).forward(model.eval(), dummy_inputs(checkpoint.spec, 1))
    return found


def _bytes_saved(checkpoint: Checkpoint, scales: Quantization, layer: str) -> float:
    if f"{layer}.weight" not in scales.amax:
        return 0.0
    weight: Any = checkpoint.model.get_submodule(layer).weight
    bits = FORMATS[scales.format_of(layer)].weights.bits
    return weight.numel() * (4.0 - (bits if isinstance(bits, int) else 1 + sum(bits)) / 8.0)


def _words(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
