"""Inputs of one denoiser evaluation: the network protocol, conditioning arrays and typed graph inputs.

    sample          [B, ...]        of the spec's sample shape, [B, C, H, W] for images
    timestep        [B]             rounded if the graph takes integers
    class_labels    [B]             class-conditional models
    guidance        [B]             models that take the guidance weight as an input
    text inputs, tensors            [B, ...], as named in the spec's conditioning
    masked_image    [B, c, h, w]    models for inpainting; without an image, everything is repainted

B is N for N samples; under guidance it is 2 N, the cond half followed by the uncond half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from diffpress.runtime.conditioning import MASKED_IMAGE, TensorInput
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import evaluations_per_step, is_guided
from diffpress.runtime.io.arrays import read_npz
from diffpress.runtime.spec import DenoiserSpec

if TYPE_CHECKING:
    from diffpress.runtime.image_inputs.control_networks import Control

SAMPLE, TIMESTEP, LABELS, GUIDANCE = "sample", "timestep", "class_labels", "guidance"


class Network(Protocol):
    """The interface of a denoiser network; anything that implements it can be sampled."""

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """The graph's input names and their dtypes."""

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the network's output for one batch, shaped like `sample`."""


@dataclass(frozen=True)
class ConditioningInputs:
    """Conditioning of N samples: graph inputs [N, ...] by name, with their unconditional counterparts for guidance.

    `control` are the images of control networks; None if there are none.
    """

    cond: Mapping[str, np.ndarray] = field(default_factory=dict)
    uncond: Mapping[str, np.ndarray] | None = None
    control: Control | None = None

    def part(self, members: slice | np.ndarray) -> ConditioningInputs:
        """Return the conditioning of these samples alone."""
        uncond = None if self.uncond is None else {name: array[members] for name, array in self.uncond.items()}
        cond = {name: array[members] for name, array in self.cond.items()}
        return ConditioningInputs(cond, uncond, None if self.control is None else self.control.part(members))

    def with_masked_image(self, array: np.ndarray) -> ConditioningInputs:
        """Return the conditioning with the input `masked_image`, which both halves share."""
        uncond = None if self.uncond is None else {**self.uncond, MASKED_IMAGE: array}
        return replace(self, cond={**self.cond, MASKED_IMAGE: array}, uncond=uncond)


def whole_mask(spec: DenoiserSpec, count: int) -> np.ndarray:
    """Return the input `masked_image` of `count` samples that repaints everything: a mask of ones, latents of zeros."""
    array = np.zeros((count, *spec.masked_image_shape), np.float32)
    mask = array[:, :1] if spec.conditioning.inpainting == "mask" else array[:, spec.sample_shape[0] :]
    mask[...] = 1.0
    return array


def class_conditioning(spec: DenoiserSpec, labels: np.ndarray | None) -> ConditioningInputs:
    """Return the conditioning for integer class labels [N], empty for None.

    Raises:
        InvalidInputError: The model is not class-conditional or a label is out of range.
    """
    if labels is None:
        return ConditioningInputs()
    conditioning = spec.conditioning
    if conditioning.kind != "class":
        raise InvalidInputError("labels were given, but the model is not class-conditional")
    labels, null_label = np.asarray(labels), conditioning.null_label
    is_integer, known = labels.dtype.kind in "iu", range(conditioning.classes)
    unknown = [v for v in labels.ravel().tolist() if v not in known and v != null_label] if is_integer else []
    if not is_integer or unknown:
        raise InvalidInputError(f"labels {unknown[:4] or labels.dtype}: not among 0..{conditioning.classes - 1}")
    return ConditioningInputs(
        {LABELS: labels}, None if null_label is None else {LABELS: np.full_like(labels, null_label)}
    )


def tensor_conditioning(spec: DenoiserSpec, count: int, arrays: Mapping[str, object]) -> ConditioningInputs:
    """Return the conditioning of `count` samples for the arrays of a model that is conditioned on tensors.

    Args:
        spec: The model's spec.
        count: Number of samples, N.
        arrays: Every tensor of the spec's conditioning by name: [N, ...], or [...] for all samples.

    Raises:
        InvalidInputError: A name, shape or dtype does not match the spec, or a value is not finite.
    """
    expected = spec.conditioning.tensors
    if set(arrays) != set(expected):
        found = ", ".join(sorted(arrays)) or "none"
        raise InvalidInputError(f"conditioning: the model expects {', '.join(expected) or 'none'}, got {found}")
    cond = {name: _checked_tensor(name, entry, count, arrays[name]) for name, entry in expected.items()}
    if not spec.conditioning.has_null:
        return ConditioningInputs(cond)
    nulls = {name: entry.null_array for name, entry in expected.items()}
    uncond = {
        name: array if (null := nulls[name]) is None else np.array(np.broadcast_to(null, array.shape))
        for name, array in cond.items()
    }
    return ConditioningInputs(cond, uncond)


def _checked_tensor(name: str, entry: TensorInput, count: int, given: object) -> np.ndarray:
    """Return the array as [count, *shape] in the entry's dtype."""
    array = np.asarray(given)
    shapes = {entry.shape, (count, *entry.shape)}
    if array.shape not in shapes:
        raise InvalidInputError(
            f"conditioning: '{name}' has shape {list(array.shape)}, expected {[count, *entry.shape]} for {count} "
            f"samples or {list(entry.shape)} for all"
        )
    if array.dtype.kind not in ("iu" if entry.dtype == "int64" else "iuf"):
        raise InvalidInputError(f"conditioning: '{name}' is {array.dtype}, expected {entry.dtype}")
    if not np.isfinite(array).all():
        raise InvalidInputError(f"conditioning: '{name}' contains NaN or infinite values")
    return np.array(np.broadcast_to(array, (count, *entry.shape)), entry.dtype)


def read_conditioning(path: Path, spec: DenoiserSpec) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file for `tensor_conditioning`, by the names of the spec's tensors.

    Raises:
        InvalidInputError: The model is not conditioned on tensors, the file is not readable, or its names do not match.
    """
    expected = spec.conditioning.tensors
    if not expected:
        raise InvalidInputError(f"{path}: the model is not conditioned on tensors; leave the conditioning out")
    arrays = read_npz(path)
    if set(arrays) != set(expected):
        found = ", ".join(sorted(arrays)) or "none"
        raise InvalidInputError(f"{path}: has the arrays {found}; the model expects {', '.join(expected)}")
    return arrays


def dummy_conditioning(spec: DenoiserSpec, count: int) -> ConditioningInputs:
    """Return conditioning for timing and comparing networks: the classes in turn, or noise for text and tensors.

    It is the same in every call. Integer tensors are zeros: their valid range is not known.
    """
    if spec.conditioning.kind == "class":
        return class_conditioning(spec, np.arange(count) % spec.conditioning.classes)
    noise = np.random.Generator(np.random.Philox(1))
    cond = {
        # sizes and masks hold no features: ones are a valid size and a mask without padding
        name: np.ones((count, *entry.shape), np.float32)
        if entry.is_plain
        else noise.standard_normal((count, *entry.shape), dtype=np.float32)
        for name, entry in spec.conditioning.inputs.items()
    }
    if spec.conditioning.tensors:
        return tensor_conditioning(
            spec, count, {n: _dummy(t, count, noise) for n, t in spec.conditioning.tensors.items()}
        )
    uncond = {
        name: array if spec.conditioning.inputs[name].is_plain else np.zeros_like(array) for name, array in cond.items()
    }
    conditions = ConditioningInputs(cond, uncond)
    if not spec.conditioning.inpainting:
        return conditions
    masked_image = noise.standard_normal((count, *spec.masked_image_shape), dtype=np.float32)
    return conditions.with_masked_image(masked_image)


def _dummy(entry: TensorInput, count: int, noise: np.random.Generator) -> np.ndarray:
    if entry.dtype == "int64":
        return np.zeros((count, *entry.shape), np.int64)
    return noise.standard_normal((count, *entry.shape), dtype=np.float32)


def dummy_inputs(network: Network, spec: DenoiserSpec, batch: int) -> dict[str, np.ndarray]:
    """Return inputs of the first evaluation for `batch` samples under the spec's plan: noise and dummy conditioning."""
    count = batch * evaluations_per_step(spec)
    noise = np.random.Generator(np.random.Philox(0))
    x = noise.standard_normal((count, *spec.sample_shape), dtype=np.float32)
    cond = dummy_conditioning(spec, count).cond
    return network_feed(network, spec, x, spec.plan.timesteps[0], cond, spec.plan.guidance)


def network_feed(
    network: Network, spec: DenoiserSpec, x: np.ndarray, t: float, cond: Mapping[str, np.ndarray], guidance: float
) -> dict[str, np.ndarray]:
    """Return the inputs of one evaluation in the graph's dtypes; x and `cond` already have both guidance halves."""
    types = network.inputs
    feed = {
        SAMPLE: x.astype(types[SAMPLE], copy=False),
        TIMESTEP: typed_timesteps([t] * len(x), types[TIMESTEP]),
    }
    return feed | _typed_conditioning(network, spec, len(x), cond, guidance)


def static_inputs(
    network: Network, spec: DenoiserSpec, conditions: ConditioningInputs, count: int
) -> dict[str, np.ndarray]:
    """Return the inputs that are constant over all steps of the spec's plan: all but sample and timestep.

    They have the graph's dtypes and, under guidance, 2 * `count` rows: the cond half, then the uncond half.

    Raises:
        InvalidInputError: The conditioning or the guidance does not match the spec.
    """
    cond = network_conditioning(spec, conditions, is_guided(spec, spec.plan.guidance))
    return _typed_conditioning(network, spec, count * evaluations_per_step(spec), cond, spec.plan.guidance)


def _typed_conditioning(
    network: Network, spec: DenoiserSpec, count: int, cond: Mapping[str, np.ndarray], guidance: float
) -> dict[str, np.ndarray]:
    """The conditioning of `count` rows, and the guidance weight if it is an input, in the graph's dtypes."""
    types = network.inputs
    weight = {GUIDANCE: np.full(count, guidance, types[GUIDANCE])} if spec.conditioning.guidance_input else {}
    return weight | {name: array.astype(types[name], copy=False) for name, array in cond.items()}


def typed_timesteps(timesteps: Sequence[float], dtype: np.dtype) -> np.ndarray:
    """Return timesteps in the graph's dtype, rounded to the nearest if that is an integer type."""
    is_integer = np.dtype(dtype).kind in "iu"
    return np.array([round(t) if is_integer else t for t in timesteps], dtype)


def network_conditioning(spec: DenoiserSpec, conditions: ConditioningInputs, guided: bool) -> dict[str, np.ndarray]:
    """The conditioning of one evaluation: the cond half, followed by the uncond half under guidance."""
    conditioning = spec.conditioning
    if conditioning.inpainting and MASKED_IMAGE not in conditions.cond:
        conditions = conditions.with_masked_image(whole_mask(spec, len(next(iter(conditions.cond.values()), ()))))
    expected = set(conditioning.names)
    if set(conditions.cond) != expected:
        if conditioning.kind == "class":
            raise InvalidInputError(
                f"the model is class-conditional: give one label of 0..{conditioning.classes - 1} per sample"
            )
        found = ", ".join(sorted(conditions.cond)) or "none"
        raise InvalidInputError(
            f"conditioning does not match: the model expects {', '.join(sorted(expected)) or 'none'}, got {found}"
        )
    if not guided:
        return dict(conditions.cond)
    if conditioning.kind == "none":
        raise InvalidInputError("guidance was set, but the model is not conditional; use guidance 1")
    if conditions.uncond is None:
        what = {"class": "a null label", "tensors": "a tensor with a null"}.get(
            conditioning.kind, "an encoded negative prompt"
        )
        raise InvalidInputError(f"guidance needs {what}, but there is none; use guidance 1")
    return {name: np.concatenate([array, conditions.uncond[name]]) for name, array in conditions.cond.items()}


def check_inputs(network: Network, spec: DenoiserSpec) -> None:
    """Raise InvalidInputError if the graph's inputs are not those that the spec requires."""
    conditioning = spec.conditioning
    expected = {SAMPLE, TIMESTEP, *conditioning.names}
    expected |= {GUIDANCE} if conditioning.guidance_input else set()
    if set(network.inputs) != expected:
        found = ", ".join(sorted(network.inputs))
        raise InvalidInputError(f"the graph's inputs are {found}; its spec requires {', '.join(sorted(expected))}")
