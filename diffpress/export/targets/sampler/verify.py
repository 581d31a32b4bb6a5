"""Verification of a sampler graph: its images are those of the runtime, which samples step by step, from equal noise.

float32    max |sampler - runtime| <= MAX_ABS for images in 0..1
others     SQNR of the images >= SQNR_DB

Rounding to few bits amplifies differences in the last bit of a sum, so that only float32 has a bound for each pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np

from diffpress.compress.evaluation.metrics import mean_sqnr_db
from diffpress.export.targets.sampler.build import ENGINE
from diffpress.export.targets.sampler.conditioning import GUIDANCE, LABELS, NOISE, UNCOND
from diffpress.export.targets.sampler.description import default_tokens, token_inputs
from diffpress.export.verify.gate import ParityFailure
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import load_engine
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import dummy_conditioning
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.prompts import IDS, open_tokenizer, tokenize
from diffpress.runtime.sampler import noise_for
from diffpress.runtime.spec import DenoiserSpec

MAX_ABS, SQNR_DB = 1e-3, 40.0
SEEDS = (0, 1)
PROMPTS = ("a photo of a red cat", "two dogs in the fog")


def verify_sampler(
    bundle: Bundle, file: str, threads: int | None = None
) -> tuple[dict[str, Any], tuple[ParityFailure, ...]]:
    """Compare a sampler graph with the runtime.

    Args:
        bundle: The bundle, whose folder has the graph.
        file: File of the graph in the bundle.
        threads: Threads of the engine; None for all.

    Returns:
        The row {max_abs, sqnr_db, samples, steps}, and what failed.
    """
    spec = bundle.spec_for(ENGINE)
    expected = runtime_images(bundle, spec, threads)
    try:
        with closing(load_engine(bundle.path / file, ENGINE, threads)) as engine:
            images = engine.run(sampler_feed(bundle, spec, engine.inputs))
    except InvalidInputError as error:
        return {}, (ParityFailure(file, ENGINE, True, None, None, f"{file}: {error}"),)
    max_abs, sqnr_db = float(np.abs(images - expected).max()), round(mean_sqnr_db(expected, images), 1)
    row = {"max_abs": float(f"{max_abs:.1e}"), "sqnr_db": sqnr_db, "samples": len(SEEDS), "steps": spec.plan.steps}
    exact = bundle.manifest["graphs"]["denoiser"]["precision"] == "fp32"
    if (max_abs <= MAX_ABS) if exact else (sqnr_db >= SQNR_DB):
        return row, ()
    required = f"a difference of at most {MAX_ABS:g}" if exact else f"{SQNR_DB:g} dB"
    message = (
        f"{file}: its images differ from the runtime's by {max_abs:.2g} ({sqnr_db:.1f} dB SQNR), {required} is "
        "required; leave the target out"
    )
    return row, (ParityFailure(file, ENGINE, True, sqnr_db, SQNR_DB, message),)


def runtime_images(bundle: Bundle, spec: DenoiserSpec, threads: int | None = None) -> np.ndarray:
    """Return the images of SEEDS that the runtime samples step by step, float32 [N, height, width, C] in 0..1."""
    low, high = spec.data_range
    with Pipeline(bundle, ENGINE, threads) as pipe:
        conditions = pipe.conditions(
            len(SEEDS),
            spec,
            prompts=PROMPTS if spec.conditioning.kind == "text" else None,
            tensors=_tensors(spec),
        )
        samples = np.concatenate(list(pipe.images(SEEDS, conditions, spec, len(SEEDS))))
    unit: np.ndarray = np.clip((samples - low) / (high - low), 0.0, 1.0).transpose(0, 2, 3, 1)
    return unit


def sampler_feed(bundle: Bundle, spec: DenoiserSpec, inputs: Mapping[str, np.dtype]) -> dict[str, np.ndarray]:
    """Return the inputs of the sampler for the images of `runtime_images`."""
    feed: dict[str, np.ndarray] = {NOISE: noise_for(SEEDS, spec.sample_shape), **(_tensors(spec) or {})}
    if LABELS in inputs:
        feed[LABELS] = np.arange(len(SEEDS)) % spec.conditioning.classes
    if GUIDANCE in inputs:
        feed[GUIDANCE] = np.asarray(spec.plan.guidance, np.float32)
    for name, (encoder, kind) in token_inputs(spec).items():
        if name not in inputs:
            continue
        if name.startswith(UNCOND):
            feed[name] = np.tile(default_tokens(bundle, spec, encoder, kind), (len(SEEDS), 1))
        else:
            tokens = tokenize(open_tokenizer(bundle.path / encoder.tokenizer / "tokenizer.json"), PROMPTS, encoder)
            feed[name] = tokens.ids if kind == IDS else tokens.mask
    return feed


def _tensors(spec: DenoiserSpec) -> dict[str, np.ndarray] | None:
    if not spec.conditioning.tensors:
        return None
    return dict(dummy_conditioning(spec, len(SEEDS)).cond)
