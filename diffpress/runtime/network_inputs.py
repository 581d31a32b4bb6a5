"""What one evaluation of a denoiser takes: the network protocol, conditioning arrays, and typed inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from diffpress.runtime.errors import BadInput
from diffpress.runtime.guidance import evaluations_per_step, is_guided
from diffpress.runtime.spec import DenoiserSpec

SAMPLE, TIMESTEP, LABELS, GUIDANCE = "sample", "timestep", "class_labels", "guidance"


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
