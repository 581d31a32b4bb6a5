"""What one evaluation of a denoiser takes: the network protocol, conditioning arrays, and typed inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from diffpress.runtime.errors import InvalidInputError
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
class ConditioningInputs:
    """What N samples are told: graph inputs [N, ...] by name, and the same for guidance's unconditional half."""

    cond: Mapping[str, np.ndarray] = field(default_factory=dict)
    uncond: Mapping[str, np.ndarray] | None = None

    def part(self, members: slice) -> ConditioningInputs:
        uncond = None if self.uncond is None else {name: array[members] for name, array in self.uncond.items()}
        return ConditioningInputs({name: array[members] for name, array in self.cond.items()}, uncond)


def class_conditioning(spec: DenoiserSpec, labels: np.ndarray | None) -> ConditioningInputs:
    """Conditions of class labels, integers [N]; empty for None. Raises InvalidInputError for labels the model does not know."""
    if labels is None:
        return ConditioningInputs()
    conditioning = spec.conditioning
    if conditioning.kind != "class":
        raise InvalidInputError("a label was asked for, but the model is not class-conditional")
    labels, uncond = np.asarray(labels), conditioning.null_label
    whole, known = labels.dtype.kind in "iu", range(conditioning.classes)
    unknown = [label for label in labels.ravel().tolist() if label not in known and label != uncond] if whole else []
    if not whole or unknown:
        raise InvalidInputError(f"labels {unknown[:4] or labels.dtype}: not among 0..{conditioning.classes - 1}")
    return ConditioningInputs({LABELS: labels}, None if uncond is None else {LABELS: np.full_like(labels, uncond)})


def dummy_conditioning(spec: DenoiserSpec, count: int) -> ConditioningInputs:
    """Conditions for measuring and comparing networks: the classes in turn, or noise in place of encoded text."""
    if spec.conditioning.kind == "class":
        return class_conditioning(spec, np.arange(count) % spec.conditioning.classes)
    noise = np.random.Generator(np.random.Philox(1))
    cond = {
        # sizes and masks are no features: ones are as good a size as any, and a mask that lets everything be seen
        name: np.ones((count, *entry.shape), np.float32)
        if entry.is_plain
        else noise.standard_normal((count, *entry.shape), dtype=np.float32)
        for name, entry in spec.conditioning.inputs.items()
    }
    uncond = {
        name: array if spec.conditioning.inputs[name].is_plain else np.zeros_like(array) for name, array in cond.items()
    }
    return ConditioningInputs(cond, uncond)


def dummy_inputs(network: Network, spec: DenoiserSpec, batch: int) -> dict[str, np.ndarray]:
    """Inputs of the first call of sampling `batch` images by the spec's plan: noise under stand-in conditions."""
    count = batch * evaluations_per_step(spec)
    noise = np.random.Generator(np.random.Philox(0))
    x = noise.standard_normal((count, *spec.sample_shape), dtype=np.float32)
    cond = dummy_conditioning(spec, count).cond
    return network_feed(network, spec, x, spec.plan.timesteps[0], cond, spec.plan.guidance)


def network_feed(
    network: Network, spec: DenoiserSpec, x: np.ndarray, t: float, cond: Mapping[str, np.ndarray], guidance: float
) -> dict[str, np.ndarray]:
    """One call's inputs in the graph's own types."""
    types = network.inputs
    feed = {
        SAMPLE: x.astype(types[SAMPLE], copy=False),
        TIMESTEP: typed_timesteps([t] * len(x), types[TIMESTEP]),
    }
    return feed | _typed_conditioning(network, spec, len(x), cond, guidance)


def static_inputs(
    network: Network, spec: DenoiserSpec, conditions: ConditioningInputs, count: int
) -> dict[str, np.ndarray]:
    """The graph's inputs besides sample and timestep in every call for `count` samples by the spec's plan, as it takes
    them; under guidance both halves, the given one first. Raises InvalidInputError as `make_predictor` does.
    """
    cond = _network_conditioning(spec, conditions, is_guided(spec, spec.plan.guidance))
    return _typed_conditioning(network, spec, count * evaluations_per_step(spec), cond, spec.plan.guidance)


def _typed_conditioning(
    network: Network, spec: DenoiserSpec, count: int, cond: Mapping[str, np.ndarray], guidance: float
) -> dict[str, np.ndarray]:
    """What `count` samples are told, and the weight of guidance where that is an input, in the graph's own types."""
    types = network.inputs
    weight = {GUIDANCE: np.full(count, guidance, types[GUIDANCE])} if spec.conditioning.guidance_input else {}
    return weight | {name: array.astype(types[name], copy=False) for name, array in cond.items()}


def typed_timesteps(timesteps: Sequence[float], dtype: np.dtype) -> np.ndarray:
    """Timesteps as a graph is told them that takes this type: one that takes whole numbers, the nearest."""
    whole = np.dtype(dtype).kind in "iu"
    return np.array([round(t) if whole else t for t in timesteps], dtype)


def _network_conditioning(spec: DenoiserSpec, conditions: ConditioningInputs, guided: bool) -> dict[str, np.ndarray]:
    """The conditions of one call: the given ones, followed by the null ones under guidance."""
    conditioning = spec.conditioning
    wanted = {LABELS} if conditioning.kind == "class" else set(conditioning.inputs)
    if set(conditions.cond) != wanted:
        if conditioning.kind == "class":
            raise InvalidInputError(
                f"the model is class-conditional: give one label of 0..{conditioning.classes - 1} per sample"
            )
        found = ", ".join(sorted(conditions.cond)) or "nothing"
        raise InvalidInputError(f"the model is told {', '.join(sorted(wanted)) or 'nothing'}, and {found} was given")
    if not guided:
        return dict(conditions.cond)
    if conditioning.kind == "none":
        raise InvalidInputError("guidance was asked for, but the model is not conditional; use guidance 1")
    if conditions.uncond is None:
        what = "a null label" if conditioning.kind == "class" else "an encoded negative prompt"
        raise InvalidInputError(f"guidance needs {what}, and there is none; use guidance 1")
    return {name: np.concatenate([array, conditions.uncond[name]]) for name, array in conditions.cond.items()}


def check_inputs(network: Network, spec: DenoiserSpec) -> None:
    conditioning = spec.conditioning
    wanted = {SAMPLE, TIMESTEP, *conditioning.inputs}
    wanted |= {LABELS} if conditioning.kind == "class" else set()
    wanted |= {GUIDANCE} if conditioning.guidance_input else set()
    if set(network.inputs) != wanted:
        found = ", ".join(sorted(network.inputs))
        raise InvalidInputError(
            f"the graph's inputs are {found}; by its spec they should be {', '.join(sorted(wanted))}"
        )
