"""Arguments of a Pipeline's call: what each kind of model takes, one seed per sample, and one value for each or all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.spec import DenoiserSpec


@dataclass(frozen=True)
class RequestArguments:
    """Arguments that say what is sampled, as one interface names them.

    Attributes:
        kinds: Argument -> the kind of conditioning that it is for.
        optional: Arguments that do not suffice alone.
        hints: Kind of conditioning -> what to give; {last} is the highest class, {tensors} are the tensors' inputs.
    """

    kinds: Mapping[str, str]
    optional: tuple[str, ...]
    hints: Mapping[str, str]


MODELS = {"text": "conditioned on text", "class": "class-conditional", "tensors": "conditioned on tensors"}
NEEDED = ("text", "tensors")  # labels have a default: the classes in turn
PYTHON = RequestArguments(
    {"prompt": "text", "negative_prompt": "text", "labels": "class", "conditioning": "tensors"},
    ("negative_prompt",),
    {
        "text": "give a prompt",
        "class": "give labels of 0..{last}",
        "tensors": "give conditioning with {tensors} for each sample",
        "none": "leave it out",
    },
)


def check_request(
    conditioning: Conditioning, given: Mapping[str, object], arguments: RequestArguments = PYTHON
) -> None:
    """Raise InvalidInputError for a request that this kind of model does not take, or that lacks what it needs.

    Args:
        conditioning: The model's.
        given: Argument -> value, None if it was left out.
        arguments: What each of them is for.
    """
    kind = conditioning.kind
    named = {name: value for name, value in given.items() if value is not None}
    for name in named:
        if arguments.kinds[name] != kind:
            what = MODELS[arguments.kinds[name]]
            raise InvalidInputError(f"{name}: the model is not {what}; {_hint(conditioning, arguments)}")
    if kind in NEEDED and not named.keys() - set(arguments.optional):
        raise InvalidInputError(missing_condition(conditioning, arguments))
    for name, value in named.items():
        for label in np.ravel(np.asarray(value)).tolist() if kind == "class" else ():
            if label not in range(conditioning.classes):
                raise InvalidInputError(f"{name} {label!r}: the model has the classes 0..{conditioning.classes - 1}")


def check_negative_prompt(spec: DenoiserSpec) -> None:
    """Raise InvalidInputError if the spec's plan has no use for a negative prompt."""
    if not is_guided(spec, spec.plan.guidance):
        raise InvalidInputError("a negative prompt needs guidance above 1, which this model or plan does without")


def missing_condition(conditioning: Conditioning, arguments: RequestArguments = PYTHON) -> str:
    """Return the message for a model whose prompt or conditioning tensors were not given."""
    return f"the model is {MODELS[conditioning.kind]}: {_hint(conditioning, arguments)}"


def _hint(conditioning: Conditioning, arguments: RequestArguments) -> str:
    """Return what to give to a model with this conditioning."""
    entries = conditioning.tensors.items()
    tensors = ", ".join(f"{name} {entry.dtype} {list(entry.shape)}" for name, entry in entries)
    return arguments.hints[conditioning.kind].format(last=conditioning.classes - 1, tensors=tensors)


def tensor_rows(spec: DenoiserSpec, tensors: Mapping[str, np.ndarray] | None) -> list[int]:
    """Return the number of rows of each array that has one row per sample."""
    entries = spec.conditioning.tensors
    arrays = (tensors or {}).items()
    return [len(array) for name, array in arrays if name in entries and array.ndim == len(entries[name].shape) + 1]


def chosen_seeds(
    seeds: int | Iterable[int] | None, prompt: object, labels: object, rows: Sequence[int] = ()
) -> list[int]:
    """Return one seed per image; without seeds, 0, 1, ... for each prompt, label or row that was listed."""
    if seeds is None:
        given: tuple[Any, ...] = (prompt, labels)
        listed = [len(value) for value in given if _is_list(value)]
        return list(range(next(iter((*listed, *rows)), 1)))
    try:
        chosen = [int(seeds)] if isinstance(seeds, int | np.integer) else [int(seed) for seed in seeds]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"seeds: expected integers, found {seeds!r}") from error
    if not chosen:
        raise InvalidInputError("seeds: give at least one seed")
    return chosen


def per_image(value: Any, count: int, what: str) -> Any:
    """Return a list with one entry per image, from one value for all or from one value per image."""
    if value is None:
        return None
    if not _is_list(value):
        return [value] * count
    if len(value) != count:
        raise InvalidInputError(
            f"{what}: {len(value)} given for {count} images; give one for each seed, or one for all"
        )
    return list(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and np.ndim(value) > 0
