"""Pairs of samples from the same noise and conditioning: comparison.png of a run, and how far the pairs agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress.compress.evaluation.evaluate import image_agreement, unscored
from diffpress.compress.models.counts import LARGE
from diffpress.compress.training.teacher_data import read_prompts
from diffpress.compress.workspace import Workspace
from diffpress.runtime.io.files import atomic
from diffpress.runtime.io.images import image_grid, to_uint8, write_image
from diffpress.runtime.network_inputs import ConditioningInputs, dummy_conditioning
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.spec import DenoiserSpec

COLUMNS, LATENT_COLUMNS, LARGE_COLUMNS = 10, 8, 4
PAIRED_WITH = "teacher, same plan"


@dataclass(frozen=True)
class Pairs:
    """Images [N, C, H, W], or other samples [N, ...], from the same noise and conditioning.

    Attributes:
        teacher: The uncompressed model's images under its own plan.
        bundle: The bundle's images under its plan.
        same_plan: The uncompressed model's images under the bundle's plan.
        columns: Pairs per row of the image grid.
        data_range: Lowest and highest pixel value.
        pictures: Whether the samples can be shown as pictures.
    """

    teacher: np.ndarray
    bundle: np.ndarray
    same_plan: np.ndarray
    columns: int
    data_range: tuple[float, float]
    pictures: bool = True


def sample_pairs(ours: Pipeline, theirs: Pipeline) -> Pairs:
    """Sample both pipelines: two rows of pairs, or one short row for models of latents, which are slow."""
    pixels = theirs.spec.is_pixel_space
    large = theirs.bundle.manifest["graphs"]["denoiser"]["parameters"] > LARGE
    columns = COLUMNS if pixels else LARGE_COLUMNS if large else LATENT_COLUMNS
    count = 2 * columns if pixels else columns
    plan = ours.spec.plan.without_corrections
    teacher, bundle = (_images(pipeline, pipeline.spec, count) for pipeline in (theirs, ours))
    same = teacher if plan == theirs.spec.plan else _images(theirs, theirs.spec.with_plan(plan), count)
    return Pairs(teacher, bundle, same, columns, theirs.spec.data_range, theirs.makes_pictures)


def write_comparison(pairs: Pairs, workspace: Workspace) -> None:
    """Write the teacher's images above and the bundle's below, each under its own sampling plan; others as arrays."""
    if not pairs.pictures:
        with atomic(workspace.comparison_arrays) as temporary, temporary.open("wb") as file:
            np.savez(file, teacher=pairs.teacher, bundle=pairs.bundle)
        return
    rows = [to_uint8(images, pairs.data_range) for images in (pairs.teacher, pairs.bundle)]
    write_image(image_grid(np.concatenate(rows), columns=pairs.columns), workspace.comparison)


def paired_scores(pairs: Pairs) -> dict[str, Any]:
    """Return the scores of a run without `evaluate`: PSNR and SSIM under the bundle's plan, if pictures."""
    nothing = unscored(len(pairs.bundle), 1)
    if not pairs.pictures:
        return {"baseline": nothing, "bundle": nothing}
    agreement = image_agreement(pairs.same_plan, pairs.bundle, pairs.data_range)
    return {"baseline": nothing, "bundle": nothing | {"paired": {"against": PAIRED_WITH, **agreement}}}


def _images(pipeline: Pipeline, spec: DenoiserSpec, count: int) -> np.ndarray:
    conditioning = _conditioning(pipeline, spec, count)
    return np.concatenate(list(pipeline.images(range(count), conditioning, spec, batch=count)))


def _conditioning(pipeline: Pipeline, spec: DenoiserSpec, count: int) -> ConditioningInputs:
    """Return the first built-in prompts or the classes in turn; dummies for tensors and without text encoders."""
    conditioning = spec.conditioning
    if conditioning.tensors or (conditioning.kind == "text" and not conditioning.encoders):
        return dummy_conditioning(spec, count)
    prompts = list(read_prompts(None)[:count]) if conditioning.kind == "text" else None
    return pipeline.conditions(count, spec, prompts=prompts)
