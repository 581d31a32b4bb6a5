"""A whole bundle at work: labels or prompts in, images out, without torch.

    prompt -> text encoders -> conditions;   noise -> denoiser, step by step -> latent;   latent -> decoder -> image

Engines beside the denoiser's are opened when their turn comes. Text encoders may be larger than all the rest: each is
closed again at once. The decoder stays open for the next batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import Engine, open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.network_inputs import ConditioningInputs, Network, class_conditioning
from diffpress.runtime.prompts import Warn, encode, open_tokenizer, unconditional
from diffpress.runtime.sampler import generate, generate_batches, labels_in_turn
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import reshifted

DECODER = "vae_decoder"


class Pipeline:
    """An open bundle; `spec` says what it samples by default. Raises InvalidInputError and MissingDependencyError as its parts do."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str | None = None,
        threads: int | None = None,
        *,
        options: EngineOptions | None = None,
    ) -> None:
        self.bundle = bundle
        for graph in (e.graph for e in bundle.spec.conditioning.encoders):
            bundle.graph(graph)  # what is missing is said before the work, not after it
        if bundle.spec.latent_factor > 1:
            bundle.graph(DECODER)
        self._options = (options or EngineOptions()).with_threads(threads)
        self.denoiser = open_engine(bundle, engine, options=self._options)
        self.spec = bundle.spec_for(self.denoiser.name)
        self._decoder: Engine | None = None

    def images(
        self,
        seeds: Sequence[int] | np.ndarray,
        conditions: ConditioningInputs,
        spec: DenoiserSpec | None = None,
        batch: int = 8,
    ) -> Iterator[np.ndarray]:
        """Images float32 [B, C, H, W] in the data range, batch by batch, one for each seed.

        `spec` is the bundle's own or one with another plan or size (`resized`).
        """
        spec = spec or self.spec
        for samples in in_streams(self.denoiser, spec, seeds, conditions, batch, self._options.streams):
            yield self.decode(samples, spec)

    def conditions(
        self,
        count: int,
        spec: DenoiserSpec | None = None,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        prompts: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
        warn: Warn = warnings.warn,
    ) -> ConditioningInputs:
        """What `count` samples are told: `labels` (None: the classes in turn) or `prompts`, one for each sample."""
        spec = spec or self.spec
        if spec.conditioning.kind != "text":
            classes = labels_in_turn(spec, count) if labels is None else np.asarray(labels)
            return class_conditioning(spec, classes)
        if prompts is None:
            raise InvalidInputError("the model is conditioned on text: give a prompt")
        guided = is_guided(spec, spec.plan.guidance)
        if negatives is not None and not guided:
            raise InvalidInputError("a negative prompt needs guidance above 1, which this model or plan does without")
        text = _Text(self.bundle, self._open)
        conditioning, size = spec.conditioning, spec.image_size
        cond = encode(prompts, conditioning, text.encoders, text.tokenizers, size, warn)
        if not guided:
            return ConditioningInputs(cond)
        uncond = unconditional(negatives, count, conditioning, text.encoders, text.tokenizers, size, warn)
        return ConditioningInputs(cond, uncond)

    def decode(self, samples: np.ndarray, spec: DenoiserSpec | None = None) -> np.ndarray:
        """Images of latents, one at a time: a decoder's memory grows with the batch. Pixels are images already."""
        spec = spec or self.spec
        if spec.latent_factor == 1:
            return samples
        latents = samples / np.float32(spec.latent_scale) + np.float32(spec.latent_shift)
        if self._decoder is None:
            self._decoder = self._open(DECODER)
        decoder, (name,) = self._decoder, self._decoder.inputs
        pictures = [decoder.run({name: latent[None].astype(decoder.inputs[name])}) for latent in latents]
        return np.clip(np.concatenate(pictures), *spec.data_range)

    def _open(self, graph: str) -> Engine:
        """Another graph in the denoiser's engine; they run one batch at a time."""
        return open_engine(self.bundle, self.denoiser.name, graph=graph, options=replace(self._options, streams=1))

    def close(self) -> None:
        """Release the engines."""
        self.denoiser.close()
        if self._decoder is not None:
            self._decoder.close()


def in_streams(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    conditions: ConditioningInputs,
    batch: int,
    streams: int = 1,
) -> Iterator[np.ndarray]:
    """As `diffpress.runtime.sampler.generate_batches`, with `streams` batches under way at the same time; in the seeds' order."""
    if streams == 1:
        yield from generate_batches(network, spec, seeds, batch=batch, conditions=conditions)
        return
    from concurrent.futures import ThreadPoolExecutor  # 20 ms that most do without

    seeds, parts = np.asarray(seeds), [slice(start, start + batch) for start in range(0, len(seeds), batch)]

    def sampled(part: slice) -> np.ndarray:
        return generate(network, spec, seeds[part], batch=batch, conditions=conditions.part(part))

    with ThreadPoolExecutor(streams) as pool:
        yield from pool.map(sampled, parts)


def resized(spec: DenoiserSpec, size: tuple[int, int], fixed: bool = False) -> DenoiserSpec:
    """The spec for images of `size` (height, width) in pixels, its plan shifted as the model wants it for that size.

    Raises InvalidInputError for a size that the model cannot make; `fixed` says that its graph is made for one size.
    """
    factor, unit = spec.latent_factor, spec.latent_factor * spec.size_multiple
    if size == spec.image_size:
        return spec
    if fixed:
        raise InvalidInputError(f"size {_by(size)}: this bundle's graph makes {_by(spec.image_size)} images only")
    if min(size) < unit or size[0] % unit or size[1] % unit:
        near = _by(tuple(max(unit, round(side / unit) * unit) for side in size))
        raise InvalidInputError(
            f"size {_by(size)}: sides must be multiples of {unit} for this model; the nearest is {near}"
        )
    shape = (spec.sample_shape[0], size[0] // factor, size[1] // factor)
    own, *others = (
        reshifted(timesteps, spec.spacing, spec.tokens(spec.sample_shape), spec.tokens(shape), spec.schedule)
        for timesteps in (spec.plan.timesteps, *spec.distilled_timesteps)
    )
    return replace(spec, sample_shape=shape, plan=spec.plan.over(own), distilled_timesteps=tuple(others))


def has_fixed_size(bundle: Bundle) -> bool:
    """Whether the denoiser's graph was made for one height and width, or does not say for which."""
    sample = bundle.manifest["graphs"]["denoiser"].get("inputs", {}).get("sample", {})
    return all(isinstance(side, int) for side in sample.get("shape", ())[2:])


class _Text:
    """A bundle's text encoders and tokenizers by name, opened when they are asked for."""

    def __init__(self, bundle: Bundle, open_graph: Callable[[str], Engine]) -> None:
        encoders = bundle.spec.conditioning.encoders
        if not encoders:
            raise InvalidInputError(
                f"{bundle.path}: the model is conditioned on text and its bundle has no text encoder; "
                "export the whole pipeline's folder, not its denoiser alone"
            )
        self.tokenizers = {e.tokenizer: open_tokenizer(bundle.path / e.tokenizer / "tokenizer.json") for e in encoders}
        self.encoders = {e.graph: _OnDemand(bundle, open_graph, e.graph) for e in encoders}


class _OnDemand:
    """A network that is opened for each run and closed after it."""

    def __init__(self, bundle: Bundle, open_graph: Callable[[str], Engine], graph: str) -> None:
        self._open = lambda: open_graph(graph)
        entries = bundle.manifest["graphs"][graph]["inputs"]
        self.inputs: Mapping[str, np.dtype] = {name: np.dtype(entry["dtype"]) for name, entry in entries.items()}

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        engine: Engine
        with closing(self._open()) as engine:
            return engine.run_all(inputs)


def _by(size: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in size)
