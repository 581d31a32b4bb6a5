"""One batch in a model's thread: images of several requests, each from its own seed and conditioning.

An image is that of `Pipeline(...)` with the same seed, conditioning and plan: the same functions make it, and the
sampler keeps the images of a batch apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.fused import run_fused_of
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sample_run import LARGE_BYTES
from diffpress.runtime.sampler import Step
from diffpress.runtime.spec import DenoiserSpec
from diffpress.serve.requests.image_request import ImageRequest


class Part(NamedTuple):
    """One image of a request, by its index."""

    request: ImageRequest
    image: int


class StepReport(NamedTuple):
    """A finished step of one image.

    Attributes:
        image: The image's index in its request.
        step: Steps that are done.
        steps: Steps of the plan.
        t: Timestep of the step.
        preview: The predicted image, float32 in the data range, or None.
    """

    image: int
    step: int
    steps: int
    t: float
    preview: np.ndarray | None


class AbandonedError(Exception):
    """Nobody waits for the batch any more."""


def sampled(
    pipeline: Pipeline,
    options: EngineOptions,
    parts: Sequence[Part],
    batch: int,
    report: Callable[[int, StepReport], None],
    is_abandoned: Callable[[], bool],
) -> list[np.ndarray]:
    """Sample images with equal `ImageRequest.key`, in the order of `parts`.

    Args:
        pipeline: The open bundle.
        options: Options that its engine was opened with.
        parts: Images to sample.
        batch: Images that are sampled together at most.
        report: Called with the position of an image in `parts` and every step of it, if its request is streamed.
        is_abandoned: Asked after every step, where the engine does not run all steps in one call.

    Raises:
        AbandonedError: `is_abandoned` returned true.
        InvalidInputError: The engine failed.
    """
    first = parts[0].request
    spec = pipeline.bundle.spec_for(pipeline.denoiser.name, first.spec)
    tensors = {name: np.stack([part.request.tensors[name][part.image] for part in parts]) for name in first.tensors}
    conditions = pipeline.conditions(
        len(parts),
        spec,
        labels=None if first.labels is None else _column(parts, "labels"),
        prompts=None if first.prompts is None else _column(parts, "prompts"),
        negatives=None if first.negatives is None else _column(parts, "negatives"),
        tensors=tensors or None,
    )
    seeds = _column(parts, "seeds")
    done = 0

    def on_step(step: Step) -> None:
        if is_abandoned():
            raise AbandonedError
        if first.stream:
            _report_step(pipeline, spec, parts[done : done + len(step.x)], done, step, report)

    images: list[np.ndarray] = []
    with np.errstate(all="ignore"):  # an extreme plan makes a black image, as in `Pipeline`
        watched = first.stream or _has_single_steps(pipeline, spec, options)
        for samples in pipeline.images(seeds, conditions, spec, batch, on_step=on_step if watched else None):
            images += list(samples)
            done = len(images)
    return images


def _column(parts: Sequence[Part], name: str) -> list[Any]:
    """Return each image's own value of what its request has for all of its images."""
    return [getattr(part.request, name)[part.image] for part in parts]


def _report_step(
    pipeline: Pipeline,
    spec: DenoiserSpec,
    parts: Sequence[Part],
    first: int,
    step: Step,
    report: Callable[[int, StepReport], None],
) -> None:
    for row, (request, image) in enumerate(parts):
        shown = request.previews > 0 and (step.index + 1) % request.previews == 0
        preview = pipeline.decode(step.x0[row : row + 1], spec)[0] if shown else None
        report(first + row, StepReport(image, step.index + 1, spec.plan.steps, step.t, preview))


def _has_single_steps(pipeline: Pipeline, spec: DenoiserSpec, options: EngineOptions) -> bool:
    """Return whether sampling returns to Python after every step anyway, so that watching the steps changes nothing."""
    if options.streams > 1:
        return False
    is_large = pipeline.bundle.manifest["graphs"]["denoiser"].get("bytes", 0) > LARGE_BYTES
    return run_fused_of(pipeline.denoiser, spec) is None or (is_large and pipeline.denoiser.name == "openvino")
