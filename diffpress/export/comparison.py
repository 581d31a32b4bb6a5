"""Pairs of samples from the same noise and conditioning: comparison.png of a run, and how far the pairs agree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.compress.evaluation.evaluate import image_agreement, unscored
from diffpress.compress.models.counts import LARGE
from diffpress.compress.training.teacher_data import read_prompts
from diffpress.compress.workspace import Workspace
from diffpress.runtime.io.files import atomic
from diffpress.runtime.io.images import GRID_GAP, image_grid, to_uint8, write_image
from diffpress.runtime.network_inputs import ConditioningInputs, dummy_conditioning
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.spec import DenoiserSpec

COLUMNS, LATENT_COLUMNS, LARGE_COLUMNS = 10, 8, 4
PAIRED_WITH = "teacher, same plan"
CAPTIONED_WIDTH = 128  # pixels; narrower images are enlarged, so that prompts fit above them
FONT_SIZE, LINE_HEIGHT, MAX_LINES = 12, 15, 4
CAPTION_GAP = 6  # pixels between the captions of neighbouring columns


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
        prompts: Prompt of each pair, of models conditioned on text.
    """

    teacher: np.ndarray
    bundle: np.ndarray
    same_plan: np.ndarray
    columns: int
    data_range: tuple[float, float]
    pictures: bool = True
    prompts: tuple[str, ...] = ()


def sample_pairs(ours: Pipeline, theirs: Pipeline, prompts: Path | None = None) -> Pairs:
    """Sample both pipelines: two rows of pairs, or one short row for models of latents, which are slow.

    `prompts` is a file of prompts, for models conditioned on text; None takes the built-in ones.
    """
    pixels = theirs.spec.is_pixel_space
    large = theirs.bundle.manifest["graphs"]["denoiser"]["parameters"] > LARGE
    columns = COLUMNS if pixels else LARGE_COLUMNS if large else LATENT_COLUMNS
    count = 2 * columns if pixels else columns
    plan = ours.spec.plan.without_corrections.without_cache  # both belong to our network alone
    spec = theirs.spec
    is_prompted = spec.conditioning.kind == "text" and spec.conditioning.encoders and not spec.conditioning.tensors
    texts = tuple(itertools.islice(itertools.cycle(read_prompts(prompts)), count)) if is_prompted else ()
    teacher, bundle = (_images(pipeline, pipeline.spec, count, texts) for pipeline in (theirs, ours))
    same = teacher if plan == spec.plan else _images(theirs, spec.with_plan(plan), count, texts)
    return Pairs(teacher, bundle, same, columns, spec.data_range, theirs.makes_pictures, texts)


def write_comparison(pairs: Pairs, workspace: Workspace) -> None:
    """Write the teacher's images above and the bundle's below, each under its own sampling plan; others as arrays.

    Prompts are written above their pair. The single pictures are stored as well, for the report.
    """
    if not pairs.pictures:
        with atomic(workspace.comparison_arrays) as temporary, temporary.open("wb") as file:
            np.savez(file, teacher=pairs.teacher, bundle=pairs.bundle)
        return
    teacher, bundle = (to_uint8(images, pairs.data_range) for images in (pairs.teacher, pairs.bundle))
    with atomic(workspace.pairs) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, teacher=teacher, bundle=bundle, prompts=np.array(pairs.prompts, dtype=str))
    pixels = np.concatenate([teacher, bundle])
    if not pairs.prompts:
        write_image(image_grid(pixels, columns=pairs.columns), workspace.comparison)
        return
    if pixels.shape[3] != 3:  # grey, or colours with transparency
        pixels = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels[..., :3]
    scale = -(-CAPTIONED_WIDTH // pixels.shape[2])
    grid = image_grid(pixels.repeat(scale, axis=1).repeat(scale, axis=2), columns=pairs.columns)
    captions = _captions(pairs.prompts, scale * pixels.shape[2], grid.shape[1])
    write_image(np.concatenate([captions, grid]), workspace.comparison)


def paired_scores(pairs: Pairs) -> dict[str, Any]:
    """Return the scores of a run without `evaluate`: PSNR and SSIM under the bundle's plan, if pictures."""
    nothing = unscored(len(pairs.bundle), 1)
    if not pairs.pictures:
        return {"baseline": nothing, "bundle": nothing}
    agreement = image_agreement(pairs.same_plan, pairs.bundle, pairs.data_range)
    return {"baseline": nothing, "bundle": nothing | {"paired": {"against": PAIRED_WITH, **agreement}}}


def _captions(prompts: Sequence[str], width: int, total_width: int) -> np.ndarray:
    """Draw one prompt above each column of this width, uint8 [H, total_width, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [_wrapped(prompt, lambda line: font.getlength(line) <= width - CAPTION_GAP) for prompt in prompts]
    image = Image.new("RGB", (total_width, LINE_HEIGHT * max(map(len, wrapped)) + GRID_GAP), "white")
    draw = ImageDraw.Draw(image)
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines):
            draw.text((column * (width + GRID_GAP), number * LINE_HEIGHT), line, "black", font)
    return np.asarray(image)


def _wrapped(prompt: str, fits: Callable[[str], bool]) -> list[str]:
    """Break a prompt into at most MAX_LINES lines that fit, the last one cut off if there is more."""
    words, lines = prompt.split(), [""]
    while words:
        longer = f"{lines[-1]} {words[0]}".strip()
        if fits(longer) or (not lines[-1] and len(lines) < MAX_LINES):
            lines[-1] = longer
            words.pop(0)
        elif len(lines) < MAX_LINES:
            lines.append("")
        else:
            break
    cut = [line + ("..." if words and line is lines[-1] else "") for line in lines]
    return [next(line[:end] for end in range(len(line), -1, -1) if fits(line[:end])) for line in cut]


def _images(pipeline: Pipeline, spec: DenoiserSpec, count: int, prompts: Sequence[str]) -> np.ndarray:
    conditioning = _conditioning(pipeline, spec, count, prompts)
    return np.concatenate(list(pipeline.images(range(count), conditioning, spec, batch=count)))


def _conditioning(pipeline: Pipeline, spec: DenoiserSpec, count: int, prompts: Sequence[str]) -> ConditioningInputs:
    """Return the prompts or the classes in turn; dummies for tensors and without text encoders."""
    conditioning = spec.conditioning
    if conditioning.tensors or (conditioning.kind == "text" and not conditioning.encoders):
        return dummy_conditioning(spec, count)
    return pipeline.conditions(count, spec, prompts=list(prompts) or None)
