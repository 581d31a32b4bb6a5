"""The body of POST /v1/sample, checked against a model: a frozen request, one row for each image.

    {"model": "icons", "prompt": "a red house", "n": 2, "seed": 7, "steps": 4, "guidance": 2.0, "stream": true}

The names are those of `Pipeline`; whatever is left out follows the bundle's own sampling plan.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress.runtime.call_arguments import check_negative_prompt, check_request, chosen_seeds, per_image, tensor_rows
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import tensor_conditioning
from diffpress.runtime.outputs import makes_pictures, output_shape
from diffpress.runtime.sampler import MAX_SEED, cycled_labels
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec
from diffpress.serve.models import Model
from diffpress.serve.requests import fields
from diffpress.serve.requests.encoding import ARRAY, FORMATS, check_format
from diffpress.serve.settings import Limits

MODEL = "model"
FIELDS = (
    MODEL,
    *("prompt", "negative_prompt", "labels", "conditioning"),
    *("n", "seed", "seeds"),
    *("steps", "solver", "spacing", "guidance", "plan", "step_cache", "height", "width"),
    *("format", "stream", "previews", "deadline_ms"),
)
RANDOM_SEEDS = 2**32  # of requests without a seed: numbers that every JSON reader keeps exactly
NAME_LENGTH = 100  # characters of a solver's, spacing's or model's name

BatchKey = tuple[SamplingPlan, tuple[int, ...], bool, bool]


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """A checked request for images.

    Attributes:
        model: Name of the model.
        spec: Its spec, with the requested plan and size.
        seeds: One seed for each image.
        prompts: One prompt for each image, for models conditioned on text.
        negatives: One negative prompt for each image, or None.
        labels: One class for each image, for models with classes.
        tensors: Arrays [images, ...] by name, for models conditioned on tensors.
        format: One of `diffpress.serve.requests.encoding.FORMATS`.
        stream: Whether every step is reported.
        previews: Every how many steps a reported step has a preview; 0 for none.
        seconds: Time that the request may take.
        warnings: What the client should know of its request.
    """

    model: str
    spec: DenoiserSpec
    seeds: tuple[int, ...]
    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...] | None
    labels: tuple[int, ...] | None
    tensors: Mapping[str, np.ndarray]
    format: str
    stream: bool
    previews: int
    seconds: float
    warnings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def key(self) -> BatchKey:
        """What images that are sampled together have in common, besides their model.

        Reported steps are a part of it: they need the sampler's loop, whose last bits differ from fused sampling's.
        """
        return (self.spec.plan, self.spec.sample_shape, self.negatives is not None, self.stream)


def model_name(body: fields.Body) -> str | None:
    """Return the name of the model that a body asks for; None for the first one."""
    return fields.text(body, MODEL, NAME_LENGTH)


def image_request(body: fields.Body, model: Model, limits: Limits) -> ImageRequest:
    """Return the request of a body.

    Raises:
        InvalidInputError: A field is unknown, has a wrong type or value, or does not fit the model.
    """
    fields.check_names(body, FIELDS)
    conditioning = model.bundle.spec.conditioning
    prompt = fields.texts(body, "prompt", limits.prompt, limits.images)
    negative = fields.texts(body, "negative_prompt", limits.prompt, limits.images)
    labels = fields.integers(body, "labels", 0, max(conditioning.classes - 1, 0), limits.images)
    tensors = _arrays(fields.mapping(body, "conditioning"))
    given = {"prompt": prompt, "negative_prompt": negative, "labels": labels, "conditioning": tensors}
    check_request(conditioning, given)
    spec, warnings = _planned(body, model, limits)
    if negative is not None:
        check_negative_prompt(spec)
    seeds = _seeds(body, limits.images, prompt, labels, tensor_rows(spec, tensors))
    if len(seeds) > limits.images:
        raise InvalidInputError(f"{len(seeds)} images: at most {limits.images} are made for one request")
    prompts = _rows(prompt, len(seeds), "prompt")
    classes = _rows(labels, len(seeds), "labels")
    if conditioning.kind == "class" and classes is None:
        cycled = cycled_labels(spec, len(seeds))
        classes = None if cycled is None else cycled.tolist()
    form = fields.choice(body, "format", FORMATS) or ("png" if makes_pictures(model.bundle) else ARRAY)
    check_format(form, makes_pictures(model.bundle), output_shape(model.bundle, spec))
    stream, previews = fields.flag(body, "stream"), fields.integer(body, "previews", 0, limits.steps)
    if previews is not None and not stream:
        raise InvalidInputError("previews: only a streamed request has them; set stream to true")
    deadline_ms = fields.number(body, "deadline_ms", 1e-3, limits.seconds * 1e3)
    return ImageRequest(
        model=model.name,
        spec=spec,
        seeds=tuple(seeds),
        prompts=prompts,
        negatives=_rows(negative, len(seeds), "negative_prompt"),
        labels=None if classes is None else tuple(classes),
        tensors={} if tensors is None else _checked(spec, len(seeds), tensors),
        format=form,
        stream=stream,
        previews=(1 if previews is None else previews) if makes_pictures(model.bundle) else 0,
        seconds=limits.seconds if deadline_ms is None else deadline_ms / 1e3,
        warnings=(*warnings, *model.truncated(prompts or ())),
    )


def _planned(body: fields.Body, model: Model, limits: Limits) -> tuple[DenoiserSpec, tuple[str, ...]]:
    """Return the spec with the requested plan and size, and its warnings."""
    height, width = (fields.integer(body, side, 1, limits.side) for side in ("height", "width"))
    if (height is None) != (width is None):
        raise InvalidInputError("height and width: give both or none")
    entries = fields.mapping(body, "plan")
    if entries is not None:
        timesteps = entries.get("timesteps")
        if isinstance(timesteps, list) and len(timesteps) > limits.steps:
            raise InvalidInputError(f"plan.timesteps: {len(timesteps)} steps; at most {limits.steps} are made")
    return model.planned(
        fields.integer(body, "steps", 1, limits.steps),
        fields.text(body, "solver", NAME_LENGTH),
        fields.text(body, "spacing", NAME_LENGTH),
        fields.number(body, "guidance", -limits.guidance, limits.guidance),
        None if height is None or width is None else (height, width),
        json.dumps(entries, sort_keys=True) if entries else "",
        body.get("step_cache") is None or fields.flag(body, "step_cache"),
    )


def _seeds(body: fields.Body, most: int, prompt: object, labels: object, rows: Sequence[int]) -> list[int]:
    """Return one seed per image: those that were given, or consecutive ones from `seed` or a random number."""
    n, seed = fields.integer(body, "n", 1, most), fields.integer(body, "seed", 0, MAX_SEED)
    seeds = fields.integers(body, "seeds", 0, MAX_SEED, most)
    if seeds is not None:
        chosen = chosen_seeds(seeds, prompt, labels, rows)
        if seed is not None or (n is not None and n != len(chosen)):
            raise InvalidInputError("seeds: has one seed for each image; leave out seed and n")
        return chosen
    count = n or len(chosen_seeds(None, prompt, labels, rows))
    first = secrets.randbelow(RANDOM_SEEDS) if seed is None else seed
    if first + count - 1 > MAX_SEED:
        raise InvalidInputError(f"seed {first}: must lie in 0..{MAX_SEED - count + 1} for {count} images")
    return list(range(first, first + count))


def _rows(value: Any, count: int, what: str) -> tuple[Any, ...] | None:
    rows = per_image(value, count, what)
    return None if rows is None else tuple(rows)


def _arrays(data: dict[str, Any] | None) -> dict[str, np.ndarray] | None:
    """Return nested lists as arrays."""
    if data is None:
        return None
    try:
        return {name: np.asarray(value) for name, value in data.items()}
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(f"conditioning: nested lists of one shape are expected ({error})") from error


def _checked(spec: DenoiserSpec, count: int, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays with one row for each image, in the model's dtypes."""
    with np.errstate(over="ignore"):
        checked = dict(tensor_conditioning(spec, count, tensors).cond)
    for name, array in checked.items():
        if not np.isfinite(array).all():
            raise InvalidInputError(f"conditioning: '{name}' has values beyond {array.dtype}")
    return checked
