"""comparison.png of a run: the teacher's images above, the bundle's below, from the same noise and conditioning."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffpress.compress.training.teacher_data import read_prompts
from diffpress.runtime.io.images import image_grid, to_uint8, write_png
from diffpress.runtime.network_inputs import ConditioningInputs, dummy_conditioning
from diffpress.runtime.pipeline import Pipeline

COLUMNS, LATENT_COLUMNS = 10, 4


def write_comparison(ours: Pipeline, theirs: Pipeline, path: Path) -> None:
    """Write the teacher's images above and the bundle's below.

    Each pipeline uses its own sampling plan. There are two rows of each, and one short row for latent models, which may
    take minutes per image.
    """
    pixels = theirs.spec.is_pixel_space
    columns = COLUMNS if pixels else LATENT_COLUMNS
    count = 2 * columns if pixels else columns
    rows = []
    for pipeline in (theirs, ours):
        images = np.concatenate(list(pipeline.images(range(count), _conditioning(pipeline, count), batch=count)))
        rows.append(to_uint8(images, pipeline.spec.data_range))
    write_png(image_grid(np.concatenate(rows), columns=columns), path)


def _conditioning(pipeline: Pipeline, count: int) -> ConditioningInputs:
    """Return the first built-in prompts or the classes in turn; dummies without text encoders."""
    conditioning = pipeline.spec.conditioning
    if conditioning.kind == "text" and not conditioning.encoders:
        return dummy_conditioning(pipeline.spec, count)
    prompts = list(read_prompts(None)[:count]) if conditioning.kind == "text" else None
    return pipeline.conditions(count, prompts=prompts)
