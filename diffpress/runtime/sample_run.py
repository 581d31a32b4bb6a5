"""A run that makes many samples and writes them to an output, batch by batch: its memory does not grow with them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffpress.runtime.caching.step_cache import LETTERS
from diffpress.runtime.engines import engine_label
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.fused import step_by_step
from diffpress.runtime.image_inputs.control_networks import Control
from diffpress.runtime.image_inputs.request import ImageRequest
from diffpress.runtime.image_inputs.start import ImageStart
from diffpress.runtime.io.image_records import is_finished
from diffpress.runtime.io.sample_files import check_pictures, check_writable, is_array, is_folder, open_output
from diffpress.runtime.lora.read import lora_facts
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sample_request import SampleRequest, conditioned
from diffpress.runtime.sampler import Step, warm_up
from diffpress.runtime.spec import DenoiserSpec

LARGE_BYTES = 2**26  # of a denoiser whose single steps are worth showing; a smaller one may run fused


def check_samples(pipeline: Pipeline, spec: DenoiserSpec, request: SampleRequest, out: str) -> None:
    """Check that the samples can be written to the output, before they are made.

    Raises:
        InvalidInputError: They cannot.
    """
    shape = pipeline.output_shape(spec)
    if pipeline.makes_pictures:
        channels, height, width = shape
        check_pictures(out, len(request), channels, (height, width))
    elif not is_array(out):
        latents = "; the bundle has no decoder, so they are latents" if spec.latent_factor > 1 else ""
        raise InvalidInputError(
            f"--out {out}: samples of shape {'x'.join(map(str, shape))} are not pictures{latents}; write them to a "
            ".npy or .npz file"
        )
    check_writable(out)


class RunImages(NamedTuple):
    """What the samples of a run start from: the request for their records, and the start of every sample."""

    request: ImageRequest
    start: ImageStart


class SampleRun:
    """Samples of a request that are still to be made: all of them, or those that are not in the output folder.

    Args:
        pipeline: The open bundle.
        spec: Its spec, with the requested plan and size.
        request: What is asked for.
        out: Where it is written, see `diffpress.runtime.io.sample_files`.
        batch: Samples that are made together.
        options: Options of the engine.
        images: What the samples start from; None for noise.
        control: Images of control networks; None for none.

    Raises:
        InvalidInputError: A file in the output folder was made with other settings.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        spec: DenoiserSpec,
        request: SampleRequest,
        out: str,
        batch: int,
        options: EngineOptions,
        images: RunImages | None = None,
        control: Control | None = None,
    ) -> None:
        self._pipeline, self._spec, self._request, self._out = pipeline, spec, request, out
        self._batch, self._streams = batch, options.streams
        self._start, self._control = None if images is None else images.start, control
        self._facts = {
            "negative_prompt": request.negative,
            "conditioning": _hash(request) if request.tensors else None,
            "solver": spec.plan.solver,
            "steps": spec.plan.steps,
            "timesteps": " ".join(f"{t:g}" for t in spec.plan.timesteps),
            "guidance": f"{spec.plan.guidance:g}",
            "step_cache": _cache_text(spec),
            "size": "x".join(map(str, spec.image_size)) if pipeline.makes_pictures else None,
            "engine": engine_label(pipeline.denoiser),
            "precision": options.precision,
            "bundle": pipeline.bundle.hash,
            "loras": lora_facts(pipeline.loras),
            **({} if images is None else images.request.facts()),
            **({} if control is None else control.request.facts()),
        }
        every = range(len(request))
        if is_folder(out):
            self._indices = np.array([i for i in every if not is_finished(Path(out), self.record(i))], np.int64)
        else:
            self._indices = np.arange(len(every))

    def __len__(self) -> int:
        return len(self._indices)

    def record(self, index: int) -> dict[str, str]:
        """Return the record of a sample."""
        request = self._request
        own = {
            "prompt": request.prompt(index),
            "label": request.label_of(self._spec, index),
            "seed": request.seed + index,
        }
        return {key: str(value) for key, value in (own | self._facts).items() if value is not None}

    def sample(self, advance: Callable[[float], None], *, shows_steps: bool = False) -> float:
        """Make and write the samples; return the seconds that it took without writing.

        Args:
            advance: Called with the number of samples that are done.
            shows_steps: Call it after each step as well, for a large denoiser.

        Raises:
            KeyboardInterrupt: It was interrupted; the message says what is kept.
        """
        if not len(self):
            return 0.0
        pipeline, spec, request, batch = self._pipeline, self._spec, self._request, self._batch
        # compiling for this batch size is part of loading, not of the time per image
        network = pipeline.denoiser if self._start is None else step_by_step(pipeline.denoiser)
        if self._control is not None:
            network = self._control.part(slice(min(batch, len(self)))).attached(pipeline.denoiser, 1)
        warm_up(network, spec, min(batch, len(self)))
        done, seconds = 0, 0.0
        records = (self.record(int(i)) for i in self._indices)
        try:
            with open_output(self._out, len(self), records, spec.data_range) as write:
                for group, conditions in conditioned(pipeline, spec, request, self._indices, batch * self._streams):
                    on_step = self._on_step(advance, done) if shows_steps else None
                    start = time.perf_counter()
                    own = None if self._start is None else self._start.part(group)
                    if self._control is not None:
                        conditions = replace(conditions, control=self._control.part(group))
                    seeds = request.seed + group
                    for samples in pipeline.images(seeds, conditions, spec, batch, on_step=on_step, start=own):
                        seconds += time.perf_counter() - start
                        write(samples)
                        done += len(samples)
                        advance(done)
                        start = time.perf_counter()
        except KeyboardInterrupt:
            if is_folder(self._out):
                kept = f"{done} of {len(self)} images are kept; run the same command again for the rest"
            else:
                kept = "nothing was written; with --out DIR/ every finished image is kept"
            raise KeyboardInterrupt(kept) from None
        return seconds

    def _on_step(self, advance: Callable[[float], None], done: int) -> Callable[[Step], None] | None:
        """Return what shows the steps of the next batch; None if that would slow the engine down."""
        small = self._pipeline.bundle.manifest["graphs"]["denoiser"].get("bytes", 0) < LARGE_BYTES
        if small or self._streams > 1 or self._pipeline.denoiser.name == "tensorrt":
            return None
        first = 0 if self._start is None else self._start.first
        return lambda step: advance(done + len(step.x) * (step.index + 1 - first) / (self._spec.plan.steps - first))


def _cache_text(spec: DenoiserSpec) -> str | None:
    """Return what every step evaluates, one letter each, with order and cut; None without a step cache."""
    cache = spec.plan.cache
    if cache is None:
        return None
    return f"{''.join(LETTERS[step] for step in cache.steps)} order {cache.order} {cache.cut}".rstrip()


def _hash(request: SampleRequest) -> str:
    """Return the sha256 of the arrays that the samples are conditioned on."""
    digest = hashlib.sha256()
    for name in sorted(request.tensors):
        array = request.tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
