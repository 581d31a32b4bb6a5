"""Mixed precision by measurement: return layers to float until a quantized model keeps its bounds.

    order(p) = noise(p) / gain(p)      noise removed per millisecond lost (per byte, if the size bound fails)
    S_k      = the first k by this order in float, the others in their formats

p is a layer, or a block whose residual sum is quantized. noise(p) (sensitivity.py) and gain(p) (its time in the float
graph minus its time in the quantized graph, in the target engine) only determine the order. The bounds are checked by
measuring S_k itself: SQNR on states of the trajectory, step latency relative to the float graph, file size, and the
Fréchet distance of its samples relative to the float model's.

    min_sqnr_db, max_frechet_ratio     limit the noise: the smallest k that keeps them, by bisection
    max_latency_ratio, max_size_mib    must then hold as well; without the other two, the largest k that keeps them

Bisection assumes that quality and cost grow with k, which holds up to measurement noise; at the k it returns, every
bound has been measured. If the bounds cannot be kept together, the stage fails like a gate and reports by how much.
QAT then trains the result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from diffpress.compress.builtin import SELECTION_FEATURES, SELECTION_REFERENCE
from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.config import EvaluateConfig
from diffpress.compress.context import Context, EngineCosts
from diffpress.compress.evaluation.evaluate import sampled_features
from diffpress.compress.evaluation.features import load_features, load_reference
from diffpress.compress.evaluation.metrics import frechet_distance, moments
from diffpress.compress.evaluation.subject import EvaluationSubject
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.counts import is_large
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.algorithms.sensitivity import (
    OutputNoise,
    decibels,
    noise_by_layer,
    quantized_layers,
)
from diffpress.compress.quantization.config import BoundsConfig
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset
from diffpress.compress.seeds import SELECTION_DRAW
from diffpress.runtime.engines import available
from diffpress.runtime.errors import GateFailedError, InvalidInputError, MissingDependencyError
from diffpress.runtime.network_inputs import Network
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)

FRECHET = EvaluateConfig(samples=128, seeds=1)

# lower limit of a gain, as a fraction of all gains: layers without gain must not precede those that reduce noise
LEAST_GAIN = 1e-3

Measure = Callable[[int], float]


def check_bounds(bounds: BoundsConfig, spec: DenoiserSpec, has_engines: bool) -> None:
    """Check that the bounds can be measured; `has_engines` tells whether the run has engines.

    Raises:
        InvalidInputError: A bound cannot be measured for this model or run.
        MissingDependencyError: The target engine is not installed.
    """
    if bounds.max_frechet_ratio is not None:
        load_features(SELECTION_FEATURES, spec)
    if has_engines and bounds.engine not in available():
        raise MissingDependencyError(bounds.engine, bounds.engine, f"quantize: bounds: engine {bounds.engine}")
    if not has_engines:
        _refuse_engine_bounds(bounds, "but this run has none")


def _refuse_engine_bounds(bounds: BoundsConfig, why: str) -> None:
    for name in ("max_latency_ratio", "max_size_mib"):
        if getattr(bounds, name) is not None:
            raise InvalidInputError(f"quantize: bounds: {name} is measured in an engine, {why}; remove it")


def within_bounds(
    checkpoint: Checkpoint, scales: Quantization, dataset: TrajectoryDataset, bounds: BoundsConfig, ctx: Context
) -> Quantization:
    """Return `scales` of the float `checkpoint` without the layers and sums that the bounds require in float.

    The measurements are stored in the context's notes as 'mixed'.

    Raises:
        GateFailedError: The bounds cannot be kept together.
        InvalidInputError: A bound cannot be measured in this run.
    """
    quantized = checkpoint.evolve(quantization=scales)
    with _costs(checkpoint, bounds, ctx) as costs:
        frechet = _frechet(checkpoint, bounds, costs)  # first: it refuses samples that it cannot score
        output_noise = OutputNoise(quantized, dataset, ctx.seed)
        noise = noise_by_layer(quantized, output_noise, ctx)
        gains = _macs(checkpoint, scales) if costs is None else costs.gains_ms(scales)
        sizes = {layer: _bytes_saved(checkpoint, scales, layer) for layer in noise}
        trials = []
        for gain in (gains, sizes) if bounds.max_size_mib is not None else (gains,):
            trial = _Trial(scales, _noise_order(noise, gain), output_noise, costs, frechet)
            trials.append((trial, _choose_k(trial, bounds)))
            if not _violations(trial, trials[-1][1], bounds):
                break
        # if no order keeps all bounds, report the failure of the first
        trial, k = trials[-1] if not _violations(*trials[-1], bounds) else trials[0]
        figures = {"all_quantized": trial.figures(0), "chosen": trial.figures(k)}
        violated = _violations(trial, k, bounds)
    unit = "macs" if costs is None else "gain_ms"
    rows = {
        layer: {"sqnr_db": round(decibels(noise[layer]), 2), unit: round(gains[layer], 4), "bytes": int(sizes[layer])}
        for layer in sorted(noise, key=lambda layer: -noise[layer])
    }
    in_float = trial.order[:k]
    ctx.notes["mixed"] = {"target": bounds.engine, "in_float": in_float, **figures, "places": rows}
    logger.info(f"{k} of {len(noise)} quantized layers and sums return to float: {_formatted(figures['chosen'])}")
    if violated:
        raise GateFailedError(
            f"quantize: bounds: with {k} of {len(noise)} layers and sums in float "
            f"(first {', '.join(in_float[:3]) or 'none'}) {'; '.join(violated)}; "
            f"all quantized: {_formatted(figures['all_quantized'])}. Relax one of the bounds"
        )
    return trial.scales(k)


class _Trial:
    """Measurements with the first k of `order` in float, cached for every k."""

    def __init__(
        self,
        scales: Quantization,
        order: list[str],
        noise: OutputNoise,
        costs: EngineCosts | None,
        frechet: Callable[[Quantization], float] | None,
    ) -> None:
        self.order = order
        self._scales, self._noise = scales, noise
        self.measures: dict[str, Measure] = {"sqnr_db": cache(self._sqnr_db)}
        if costs is not None:
            self.measures["latency_ratio"] = cache(lambda k: costs.latency_ratio(self.scales(k)))
            self.measures["size_mib"] = cache(lambda k: costs.size_mib(self.scales(k)))
        if frechet is not None:
            self.measures["frechet_ratio"] = cache(lambda k: frechet(self.scales(k)))

    def scales(self, k: int) -> Quantization:
        """Return the scales without the first k of the order."""
        return self._scales.without(self.order[:k])

    def figures(self, k: int) -> dict[str, float]:
        """Return all measurements by name, rounded to 4 decimals."""
        return {name: round(measure(k), 4) for name, measure in self.measures.items()}

    def _sqnr_db(self, k: int) -> float:
        return decibels(self._noise.of(self.order[k:]))


def _choose_k(trial: _Trial, bounds: BoundsConfig) -> int:
    """Return how many of the trial's order return to float; see the module docstring."""
    most, k = len(trial.order), 0
    measure = trial.measures
    if bounds.min_sqnr_db is None and bounds.max_frechet_ratio is None:
        # without a quality bound: the highest quality that the cost bounds allow
        return most - smallest(0, most, lambda back: not _violations(trial, most - back, bounds))
    if (least := bounds.min_sqnr_db) is not None:
        k = smallest(k, most, lambda k: measure["sqnr_db"](k) >= least)
    if (largest := bounds.max_frechet_ratio) is not None:
        k = smallest(k, most, lambda k: measure["frechet_ratio"](k) <= largest)
    return k


def smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the smallest k in low..high for which `holds` is true, by bisection; `high` if it never is."""
    if holds(low):
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _violations(trial: _Trial, k: int, bounds: BoundsConfig) -> list[str]:
    """Describe the bounds that do not hold with the first k in float."""
    found = ["no layer would remain quantized"] if k == len(trial.order) else []
    for name, bound in bounds.limits.items():
        side, _, what = name.partition("_")
        value = trial.measures[what](k)
        if value < bound if side == "min" else value > bound:
            found.append(f"{what} is {value:.4g}, {name} is {bound:g}")
    return found


def _noise_order(noise: Mapping[str, float], gain: Mapping[str, float]) -> list[str]:
    """Sort by noise per gain, in descending order."""
    floor = LEAST_GAIN * sum(max(value, 0.0) for value in gain.values()) or 1.0
    return sorted(noise, key=lambda layer: (-noise[layer] / max(gain[layer], floor), layer))


@contextmanager
def _costs(checkpoint: Checkpoint, bounds: BoundsConfig, ctx: Context) -> Iterator[EngineCosts | None]:
    if ctx.open_engine_costs is not None and not is_large(checkpoint.model):
        with ctx.open_engine_costs(checkpoint, bounds.engine) as costs:
            yield costs
        return
    if ctx.open_engine_costs is not None:
        _refuse_engine_bounds(bounds, "but the model is too large to be timed")
    logger.info("not timed in an engine: MACs are used as the gain of a layer")
    yield None


def _frechet(
    checkpoint: Checkpoint, bounds: BoundsConfig, costs: EngineCosts | None
) -> Callable[[Quantization], float] | None:
    """Return a function: scales -> Fréchet distance as a ratio to the float model's, from the same noise.

    It selects, so network, real images and noise are not those that a run is scored with.
    """
    if bounds.max_frechet_ratio is None:
        return None
    # an engine here has no cached graph, and the ratio compares two networks under one plan
    spec = checkpoint.spec.with_plan(checkpoint.spec.plan.without_cache)
    features = load_features(SELECTION_FEATURES, spec)
    real = moments(load_reference(SELECTION_REFERENCE, features, spec).features)

    @contextmanager
    def opened(quantization: Quantization | None) -> Iterator[Network]:
        if costs is not None:
            with costs.network(quantization) as network:
                yield network
        else:
            yield TorchNetwork(fake_quantized(checkpoint.evolve(quantization=quantization)), spec)

    def distance(quantization: Quantization | None) -> float:
        with opened(quantization) as network:
            subject, what = EvaluationSubject(network, spec), "sampling for max_frechet_ratio"
            ((found, _),) = sampled_features(subject, FRECHET, features, what, [SELECTION_DRAW])
        return frechet_distance(*moments(found), *real)

    exact = distance(None)
    return lambda quantization: distance(quantization) / exact


def _macs(checkpoint: Checkpoint, scales: Quantization) -> dict[str, float]:
    """Return layer or block -> low-precision multiply-accumulates per sample."""
    found, hooks = dict.fromkeys(quantized_layers(scales), 0.0), []
    model = checkpoint.shared_model()

    def count_macs(name: str, layer: nn.Module, out: torch.Tensor) -> None:
        weight: Any = layer.weight
        found[name] += out.numel() * weight.numel() / weight.shape[0]

    for name in scales.layers:
        if f"{name}.input" in scales.amax:
            layer = model.get_submodule(name)
            hooks.append(layer.register_forward_hook(lambda layer, _, out, name=name: count_macs(name, layer, out)))
    with torch.no_grad():
        adapter_for(model).forward(model.eval(), dummy_inputs(checkpoint.spec, 1))
    return found


def _bytes_saved(checkpoint: Checkpoint, scales: Quantization, layer: str) -> float:
    if f"{layer}.weight" not in scales.amax:
        return 0.0
    weight: Any = checkpoint.model.get_submodule(layer).weight
    return float(weight.numel() * (4.0 - FORMATS[scales.format_of(layer)].weights.width / 8.0))


def _formatted(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
