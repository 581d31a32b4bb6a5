"""A request for many samples, whose conditioning is made a few samples at a time.

Sample i starts from seed + i and has prompt i // number. Encoded text is large (8 MiB per prompt for Flux), so that the
prompts are encoded in groups, each of them once however many samples it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.spec import DenoiserSpec

ENCODED_BYTES = 2**28  # of text that is held at a time
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class SampleRequest:
    """Request for samples.

    Attributes:
        seed: Seed of the first sample.
        number: Number of samples, for each prompt if there are prompts.
        prompts: Prompts of a model that is conditioned on text.
        negative: What no image should show.
        label: Class of all samples; None takes the classes of the model in turn.
        tensors: Arrays of a model that is conditioned on tensors, [N, ...], or [...] for all samples.
    """

    seed: int
    number: int
    prompts: tuple[str, ...] = ()
    negative: str | None = None
    label: int | None = None
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.number * max(1, len(self.prompts))

    def prompt(self, index: int) -> str | None:
        """Return the prompt of a sample."""
        return self.prompts[index // self.number] if self.prompts else None

    def label_of(self, spec: DenoiserSpec, index: int) -> int | None:
        """Return the class of a sample; None for a model without classes."""
        if spec.conditioning.kind != "class":
            return None
        return index % spec.conditioning.classes if self.label is None else self.label


def conditioned(
    pipeline: Pipeline, spec: DenoiserSpec, request: SampleRequest, indices: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, ConditioningInputs]]:
    """Yield the samples `indices` in groups of at most `size`, with the conditioning of each group.

    Raises:
        InvalidInputError: The request does not fit the model.
    """
    if not request.prompts:
        for group in _parts(indices, size):
            yield group, _conditioning(pipeline, spec, request, group)
        return
    chosen = indices // request.number
    for prompts in _parts(np.unique(chosen), max(size, ENCODED_BYTES // _bytes_per_prompt(spec))):
        encoded = pipeline.conditions(
            len(prompts),
            spec,
            prompts=[request.prompts[k] for k in prompts],
            negatives=None if request.negative is None else [request.negative] * len(prompts),
        )
        for group in _parts(indices[(chosen >= prompts[0]) & (chosen <= prompts[-1])], size):
            yield group, encoded.part(np.searchsorted(prompts, group // request.number))


def _conditioning(
    pipeline: Pipeline, spec: DenoiserSpec, request: SampleRequest, group: np.ndarray
) -> ConditioningInputs:
    if spec.conditioning.kind == "class":
        classes = group % spec.conditioning.classes if request.label is None else np.full(len(group), request.label)
        return pipeline.conditions(len(group), spec, labels=classes)
    ranks = {name: len(entry.shape) for name, entry in spec.conditioning.tensors.items()}
    tensors = {
        name: array[group] if array.ndim > ranks.get(name, array.ndim) else array
        for name, array in request.tensors.items()
    }
    return pipeline.conditions(len(group), spec, tensors=tensors or None)


def _parts(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), size):
        yield array[start : start + size]


def _bytes_per_prompt(spec: DenoiserSpec) -> int:
    """Size of both halves of one encoded prompt."""
    return 2 * FLOAT32_BYTES * sum(prod(entry.shape) for entry in spec.conditioning.inputs.values())
