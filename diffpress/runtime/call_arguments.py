"""Arguments of a Pipeline's call: what each kind of model takes, one seed per sample, and one value for each or all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec


def check_request(
    conditioning: Conditioning,
    *,
    prompt: object = None,
    negative_prompt: object = None,
    labels: object = None,
    tensors: object = None,
) -> None:
    """Raise InvalidInputError for a request that this kind of model does not take, or a missing prompt or tensor."""
    kind = conditioning.kind
    if kind == "tensors" and tensors is None:
        raise InvalidInputError(missing_tensors(conditioning))
    if kind != "tensors" and tensors is not None:
        raise InvalidInputError("conditioning: the model is not conditioned on tensors; leave it out")
    if kind != "text" and (prompt is not None or negative_prompt is not None):
        hint = f"give labels of 0..{conditioning.classes - 1}" if kind == "class" else "leave the prompt out"
        name = "prompt" if prompt is not None else "negative_prompt"
        raise InvalidInputError(f"{name}: the model is not conditioned on text; {hint}")
    if kind == "text" and prompt is None:
        raise InvalidInputError("the model is conditioned on text: give a prompt")
    if labels is None:
        return
    if kind != "class":
        raise InvalidInputError("labels: the model is not class-conditional; leave the labels out")
    for label in np.ravel(np.asarray(labels)).tolist():
        if label not in range(conditioning.classes):
            raise InvalidInputError(f"labels: {label!r} is not a class of the model, 0..{conditioning.classes - 1}")


def missing_tensors(conditioning: Conditioning) -> str:
    """Return the message for a model whose conditioning tensors were not given."""
    shapes = ", ".join(f"{name} {entry.dtype} {list(entry.shape)}" for name, entry in conditioning.tensors.items())
    return f"conditioning: the model is conditioned on tensors: give {shapes} for each sample"


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
