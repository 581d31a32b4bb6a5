"""From a network to one contract for every solver: denoise(x, point) -> x_0.

With x = alpha x_0 + sigma eps, each prediction is one linear map away from x_0 (float32 throughout):

    epsilon   x_0 = (x - sigma out) / alpha
    v         x_0 = (alpha x - sigma out) / (alpha^2 + sigma^2)        from out = alpha eps - sigma x_0
    sample    x_0 = out
    flow      x_0 = (x - sigma out) / (alpha + sigma)                  from out = eps - x_0

Classifier-free guidance (Ho & Salimans 2022) mixes out = null + w (label - null); the label half and the null
half go through the network in one call. Its spread, which w widens, may be taken back towards that of the label half
(Lin et al. 2024, eq. 15-16), out (phi std(label) / std(out) + 1 - phi), and outside an interval of noise the label half
goes alone (Kynkaanniemi et al. 2024). What rounding does to a quantized network on the average is taken off then,
(out - bias[channel]) / (1 + slope), each timestep's own (runtime.spec.Correction).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from runtime.errors import BadInput
from runtime.schedule import Point
from runtime.spec import Correction, DenoiserSpec, Threshold

SAMPLE, TIMESTEP, LABELS, GUIDANCE = "sample", "timestep", "class_labels", "guidance"

Denoise = Callable[[np.ndarray, Point], np.ndarray]
Predict = Callable[[np.ndarray, Point], np.ndarray]
Interval = tuple[float, float | None]


class Network(Protocol):
    """What a denoiser needs of an engine; anything that has these two can be sampled."""

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """The graph's inputs and their types."""

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The network's output for one batch, shaped like `sample`."""


@dataclass(frozen=True)
class Conditions:
    """What N samples are told: graph inputs [N, ...] by name, and the same for guidance's unconditional half."""

    given: Mapping[str, np.ndarray] = field(default_factory=dict)
    null: Mapping[str, np.ndarray] | None = None

    def part(self, members: slice) -> Conditions:
        null = None if self.null is None else {name: array[members] for name, array in self.null.items()}
        return Conditions({name: array[members] for name, array in self.given.items()}, null)


def make_denoiser(
    network: Network,
    spec: DenoiserSpec,
    *,
    conditions: Conditions | None = None,
    guidance: float = 1.0,
    clip: bool = True,
    corrections: Mapping[float, Correction] | None = None,
    threshold: Threshold | None = None,
    interval: Interval | None = None,
    rescale: float = 0.0,
) -> Denoise:
    """The function (x float32 [N, C, H, W], point) -> x_0 of the same shape, for N samples under these conditions.

    `clip` bounds x_0 to the data range, `threshold` in its place; `corrections` go by timestep; `interval` and
    `rescale` are the plan's of guidance. A `guidance` of 1, or one that the network takes
    as an input, makes one network evaluation a step; any other weight makes two. Raises BadInput where the conditions,
    the guidance or the graph's inputs do not fit the spec.
    """
    predict = make_predictor(
        network, spec, conditions=conditions, guidance=guidance, interval=interval, rescale=rescale
    )
    return denoiser_of(predict, spec, clip=clip, corrections=corrections, threshold=threshold)


def plan_denoiser(network: Network, spec: DenoiserSpec, conditions: Conditions | None = None) -> Denoise:
    """`make_denoiser` with everything as the spec's plan has it."""
    plan = spec.plan
    return make_denoiser(
        network,
        spec,
        conditions=conditions,
        guidance=plan.guidance,
        clip=plan.clip,
        corrections=dict(zip(plan.timesteps, plan.corrections, strict=False)),  # one for each, or none
        threshold=plan.threshold,
        interval=plan.guidance_interval,
        rescale=plan.guidance_rescale,
    )


def make_predictor(
    network: Network,
    spec: DenoiserSpec,
    *,
    conditions: Conditions | None = None,
    guidance: float = 1.0,
    interval: Interval | None = None,
    rescale: float = 0.0,
) -> Predict:
    """The function (x, point) -> the network's output after guidance; as `make_denoiser`, of which it is the half."""
    _check_inputs(network, spec)
    conditions = conditions or Conditions()
    alone = _told(spec, conditions, guided=False)
    both = _told(spec, conditions, guided=True) if is_guided(spec, guidance) else alone

    def predict(x: np.ndarray, point: Point) -> np.ndarray:
        if spec.fixed_timesteps and point.t not in spec.fixed_timesteps:
            raise BadInput(
                f"timestep {point.t:g} is not one of the {len(spec.fixed_timesteps)} that this network was exported "
                "for, and the plan's solver asks there; take another solver, or export again without --fixed-plan"
            )
        weight = guidance if _acts(interval, point) else 1.0
        if not is_guided(spec, weight):
            return network.run(_feed(network, spec, x, point.t, alone, weight))
        out = network.run(_feed(network, spec, np.concatenate([x, x]), point.t, both, weight))
        label, null = np.split(out, 2)
        mixed: np.ndarray = null + weight * (label - null)
        return rescaled(mixed, label, rescale) if rescale > 0 else mixed

    return predict


def rescaled(mixed: np.ndarray, label: np.ndarray, phi: float) -> np.ndarray:
    """Guided outputs [N, ...] with their spread brought `phi` of the way back to that of the label half."""
    axes = tuple(range(1, mixed.ndim))
    spread, wanted = (array.std(axis=axes, keepdims=True) for array in (mixed, label))
    result: np.ndarray = mixed * (phi * wanted / np.maximum(spread, np.finfo(np.float32).tiny) + (1.0 - phi))
    return result


def denoiser_of(
    predict: Predict,
    spec: DenoiserSpec,
    *,
    clip: bool = True,
    corrections: Mapping[float, Correction] | None = None,
    threshold: Threshold | None = None,
) -> Denoise:
    """The other half: x_0 read off what `predict` returns, after the timestep's correction where it has one."""
    low, high = spec.data_range
    known = {} if corrections is None else corrections

    def denoise(x: np.ndarray, point: Point) -> np.ndarray:
        out = predict(x, point)
        if point.t in known:
            out = corrected(out, known[point.t])
        x0 = to_x0(spec.prediction, x, out, point)
        if threshold is not None:
            return thresholded(x0, threshold, spec.data_range)
        return np.clip(x0, low, high) if clip else x0

    return denoise


def thresholded(x0: np.ndarray, threshold: Threshold, data_range: tuple[float, float]) -> np.ndarray:
    """x_0 [N, ...] by dynamic thresholding (runtime.spec.Threshold), of data in any range."""
    middle, half = sum(data_range) / 2.0, (data_range[1] - data_range[0]) / 2.0
    unit = (x0 - middle) / half
    s = np.quantile(np.abs(unit).reshape(len(unit), -1), threshold.ratio, axis=1)
    s = np.clip(s, 1.0, threshold.most).astype(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
    result: np.ndarray = np.clip(unit, -s, s) / s * half + middle
    return result


def corrected(out: np.ndarray, correction: Correction) -> np.ndarray:
    """(out - bias) / (1 + slope) of outputs [N, C, H, W], float32."""
    bias = np.asarray(correction.bias, np.float32)[:, None, None]
    result: np.ndarray = (out - bias) * np.float32(1.0 / (1.0 + correction.slope))
    return result


def to_x0(prediction: str, x: np.ndarray, out: np.ndarray, point: Point) -> np.ndarray:
    """x_0 from what the network returned at x (see above); raises BadInput for epsilon at pure noise."""
    alpha, sigma = point.alpha, point.sigma
    if prediction == "sample":
        return out
    if prediction == "v":
        return (alpha * x - sigma * out) / (alpha**2 + sigma**2)
    if prediction == "flow":
        return (x - sigma * out) / (alpha + sigma)
    if alpha == 0.0:
        raise BadInput(
            f"timestep {point.t:g} is pure noise (alpha 0), where an epsilon prediction says nothing about "
            "the image; start the plan at an earlier timestep"
        )
    return (x - sigma * out) / alpha


def is_guided(spec: DenoiserSpec, guidance: float) -> bool:
    """Whether this weight takes two network evaluations: 1 leaves the given half alone."""
    return guidance != 1.0 and not spec.conditioning.guidance_input


def evaluations_per_step(spec: DenoiserSpec) -> int:
    """Network evaluations for one call for one sample by the spec's plan: two under guidance, where it acts."""
    return 2 if is_guided(spec, spec.plan.guidance) else 1


def evaluations_at(spec: DenoiserSpec, point: Point) -> int:
    """As `evaluations_per_step`, at this point: outside the guidance interval it is one."""
    return evaluations_per_step(spec) if _acts(spec.plan.guidance_interval, point) else 1


def _acts(interval: Interval | None, point: Point) -> bool:
    """Whether guidance acts there: low < sigma / alpha <= high."""
    if interval is None:
        return True
    low, high = interval
    return point.sigma > low * point.alpha and (high is None or point.sigma <= high * point.alpha)


def class_conditions(spec: DenoiserSpec, labels: np.ndarray | None) -> Conditions:
    """Conditions of class labels, integers [N]; empty for None. Raises BadInput for labels the model does not know."""
    if labels is None:
        return Conditions()
    conditioning = spec.conditioning
    if conditioning.kind != "class":
        raise BadInput("a label was asked for, but the model is not class-conditional")
    labels, null = np.asarray(labels), conditioning.null_label
    whole, known = labels.dtype.kind in "iu", range(conditioning.classes)
    unknown = [label for label in labels.ravel().tolist() if label not in known and label != null] if whole else []
    if not whole or unknown:
        raise BadInput(f"labels {unknown[:4] or labels.dtype}: not among 0..{conditioning.classes - 1}")
    return Conditions({LABELS: labels}, None if null is None else {LABELS: np.full_like(labels, null)})


def stand_in_conditions(spec: DenoiserSpec, count: int) -> Conditions:
    """Conditions for measuring and comparing networks: the classes in turn, or noise in place of encoded text."""
    if spec.conditioning.kind == "class":
        return class_conditions(spec, np.arange(count) % spec.conditioning.classes)
    noise = np.random.Generator(np.random.Philox(1))
    given = {
        # sizes and masks are no features: ones are as good a size as any, and a mask that lets everything be seen
        name: np.ones((count, *entry.shape), np.float32)
        if entry.is_plain
        else noise.standard_normal((count, *entry.shape), dtype=np.float32)
        for name, entry in spec.conditioning.inputs.items()
    }
    null = {
        name: array if spec.conditioning.inputs[name].is_plain else np.zeros_like(array)
        for name, array in given.items()
    }
    return Conditions(given, null)


def network_inputs(network: Network, spec: DenoiserSpec, batch: int) -> dict[str, np.ndarray]:
    """Inputs of the first call of sampling `batch` images by the spec's plan: noise under stand-in conditions."""
    count = batch * evaluations_per_step(spec)
    noise = np.random.Generator(np.random.Philox(0))
    x = noise.standard_normal((count, *spec.sample_shape), dtype=np.float32)
    told = stand_in_conditions(spec, count).given
    return _feed(network, spec, x, spec.plan.timesteps[0], told, spec.plan.guidance)


def _feed(
    network: Network, spec: DenoiserSpec, x: np.ndarray, t: float, told: Mapping[str, np.ndarray], guidance: float
) -> dict[str, np.ndarray]:
    """One call's inputs in the graph's own types."""
    types = network.inputs
    feed = {
        SAMPLE: x.astype(types[SAMPLE], copy=False),
        TIMESTEP: told_timesteps([t] * len(x), types[TIMESTEP]),
    }
    return feed | _typed(network, spec, len(x), told, guidance)


def told_throughout(
    network: Network, spec: DenoiserSpec, conditions: Conditions, count: int
) -> dict[str, np.ndarray]:
    """The graph's inputs besides sample and timestep in every call for `count` samples by the spec's plan, as it takes
    them; under guidance both halves, the given one first. Raises BadInput as `make_predictor` does."""
    told = _told(spec, conditions, is_guided(spec, spec.plan.guidance))
    return _typed(network, spec, count * evaluations_per_step(spec), told, spec.plan.guidance)


def _typed(
    network: Network, spec: DenoiserSpec, count: int, told: Mapping[str, np.ndarray], guidance: float
) -> dict[str, np.ndarray]:
    """What `count` samples are told, and the weight of guidance where that is an input, in the graph's own types."""
    types = network.inputs
    weight = {GUIDANCE: np.full(count, guidance, types[GUIDANCE])} if spec.conditioning.guidance_input else {}
    return weight | {name: array.astype(types[name], copy=False) for name, array in told.items()}


def told_timesteps(timesteps: Sequence[float], dtype: np.dtype) -> np.ndarray:
    """Timesteps as a graph is told them that takes this type: one that takes whole numbers, the nearest."""
    whole = np.dtype(dtype).kind in "iu"
    return np.array([round(t) if whole else t for t in timesteps], dtype)


def _told(spec: DenoiserSpec, conditions: Conditions, guided: bool) -> dict[str, np.ndarray]:
    """The conditions of one call: the given ones, followed by the null ones under guidance."""
    conditioning = spec.conditioning
    wanted = {LABELS} if conditioning.kind == "class" else set(conditioning.inputs)
    if set(conditions.given) != wanted:
        if conditioning.kind == "class":
            raise BadInput(
                f"the model is class-conditional: give one label of 0..{conditioning.classes - 1} per sample"
            )
        found = ", ".join(sorted(conditions.given)) or "nothing"
        raise BadInput(f"the model is told {', '.join(sorted(wanted)) or 'nothing'}, and {found} was given")
    if not guided:
        return dict(conditions.given)
    if conditioning.kind == "none":
        raise BadInput("guidance was asked for, but the model is not conditional; use guidance 1")
    if conditions.null is None:
        what = "a null label" if conditioning.kind == "class" else "an encoded negative prompt"
        raise BadInput(f"guidance needs {what}, and there is none; use guidance 1")
    return {name: np.concatenate([array, conditions.null[name]]) for name, array in conditions.given.items()}


def _check_inputs(network: Network, spec: DenoiserSpec) -> None:
    conditioning = spec.conditioning
    wanted = {SAMPLE, TIMESTEP, *conditioning.inputs}
    wanted |= {LABELS} if conditioning.kind == "class" else set()
    wanted |= {GUIDANCE} if conditioning.guidance_input else set()
    if set(network.inputs) != wanted:
        found = ", ".join(sorted(network.inputs))
        raise BadInput(f"the graph's inputs are {found}; by its spec they should be {', '.join(sorted(wanted))}")
