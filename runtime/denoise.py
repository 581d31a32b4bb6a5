"""From a network to one contract for every solver: denoise(x, point) -> x_0.

With x = alpha x_0 + sigma eps, each prediction is one linear map away from x_0 (float32 throughout):

    epsilon   x_0 = (x - sigma out) / alpha
    v         x_0 = (alpha x - sigma out) / (alpha^2 + sigma^2)        from out = alpha eps - sigma x_0
    sample    x_0 = out
    flow      x_0 = (x - sigma out) / (alpha + sigma)                  from out = eps - x_0

Classifier-free guidance (Ho & Salimans 2022) mixes out = null + w (label - null); the label half and the null
half go through the network in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from runtime.errors import BadInput
from runtime.schedule import Point
from runtime.spec import DenoiserSpec, Plan

SAMPLE, TIMESTEP, LABELS = "sample", "timestep", "class_labels"

Denoise = Callable[[np.ndarray, Point], np.ndarray]


class Network(Protocol):
    """What a denoiser needs of an engine; anything that has these two can be sampled."""

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """The graph's inputs and their types."""

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The network's output for one batch, shaped like `sample`."""


def make_denoiser(
    network: Network,
    spec: DenoiserSpec,
    *,
    labels: np.ndarray | None = None,
    guidance: float = 1.0,
    clip: bool = True,
) -> Denoise:
    """The function (x float32 [N, C, H, W], point) -> x_0 of the same shape, for these N `labels` (integers).

    `clip` bounds x_0 to the data range, `guidance` 1 makes one network evaluation a step and any other weight
    two. Raises BadInput where the labels, the guidance or the graph's inputs do not fit the spec.
    """
    _check_inputs(network, spec)
    guided = guidance != 1.0  # the weight 1 leaves the label half alone
    classes = _class_labels(spec, labels, guided)
    low, high = spec.data_range

    def denoise(x: np.ndarray, point: Point) -> np.ndarray:
        doubled = np.concatenate([x, x]) if guided else x
        out = network.run(_feed(network, doubled, point.t, classes))
        if guided:
            label, null = np.split(out, 2)
            out = null + guidance * (label - null)
        x0 = to_x0(spec.prediction, x, out, point)
        return np.clip(x0, low, high) if clip else x0

    return denoise


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


def evaluations_per_step(plan: Plan) -> int:
    """Network evaluations for one step of one sample: two under guidance."""
    return 1 if plan.guidance == 1.0 else 2


def network_inputs(network: Network, spec: DenoiserSpec, batch: int) -> dict[str, np.ndarray]:
    """Inputs of the first call of sampling `batch` images by the spec's plan: noise, and labels in turn."""
    count = batch * evaluations_per_step(spec.plan)
    noise = np.random.Generator(np.random.Philox(0))
    x = noise.standard_normal((count, *spec.sample_shape), dtype=np.float32)
    labels = np.arange(count) % spec.conditioning.classes if spec.conditioning.kind == "class" else None
    return _feed(network, x, spec.plan.timesteps[0], labels)


def _feed(network: Network, x: np.ndarray, t: float, labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """One call's inputs in the graph's own types; a graph with whole timesteps is told the nearest one."""
    types = network.inputs
    whole = np.issubdtype(types[TIMESTEP], np.integer)
    feed = {
        SAMPLE: x.astype(types[SAMPLE], copy=False),
        TIMESTEP: np.full(len(x), round(t) if whole else t, dtype=types[TIMESTEP]),
    }
    if labels is not None:
        feed[LABELS] = labels.astype(types[LABELS], copy=False)
    return feed


def _class_labels(spec: DenoiserSpec, labels: np.ndarray | None, guided: bool) -> np.ndarray | None:
    """The labels of one call: none, the given ones, or the given ones followed by as many null labels."""
    conditioning = spec.conditioning
    if conditioning.kind != "class":
        if labels is not None or guided:
            wish = "a label" if labels is not None else "guidance"
            raise BadInput(f"{wish} was asked for, but the model is not class-conditional")
        return None
    if labels is None:
        raise BadInput(f"the model is class-conditional: give one label of 0..{conditioning.classes - 1} per sample")
    labels = np.asarray(labels)
    known = (labels >= 0) & (labels < conditioning.classes) | (labels == conditioning.null_label)
    if not np.issubdtype(labels.dtype, np.integer) or not known.all():
        raise BadInput(f"labels {labels[~known].tolist()[:4] or labels.dtype}: not among 0..{conditioning.classes - 1}")
    if not guided:
        return labels
    if conditioning.null_label is None:
        raise BadInput("guidance needs a null label, and the model was not trained with one; use guidance 1")
    return np.concatenate([labels, np.full_like(labels, conditioning.null_label)])


def _check_inputs(network: Network, spec: DenoiserSpec) -> None:
    if spec.conditioning.kind == "text":
        raise BadInput("the model is conditioned on text, which this runtime does not encode")
    wanted = {SAMPLE, TIMESTEP} | ({LABELS} if spec.conditioning.kind == "class" else set())
    if set(network.inputs) != wanted:
        found = ", ".join(sorted(network.inputs))
        raise BadInput(f"the graph's inputs are {found}; by its spec they should be {', '.join(sorted(wanted))}")
