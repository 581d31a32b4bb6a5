"""An open bundle: prompts or labels in, images out, without torch.

    prompt -> text encoders -> conditioning;   noise -> denoiser, step by step -> latent;   latent -> decoder -> image

The engines of the other components are opened when they are needed. A text encoder may be larger than everything else,
so each one is closed directly after use. The decoder stays open for the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.engines import Engine, open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.io.images import to_pil
from diffpress.runtime.network_inputs import ConditioningInputs, Network, class_conditioning
from diffpress.runtime.prompts import encode, open_tokenizer, unconditional
from diffpress.runtime.requested_plan import requested_spec
from diffpress.runtime.sampler import Step, cycled_labels, generate, generate_batches
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import reshifted

if TYPE_CHECKING:
    from PIL import Image

DECODER = "vae_decoder"


class Pipeline:
    """An open bundle: call it to sample images.

    Args:
        bundle: The bundle's folder, or a loaded `Bundle`.
        engine: "openvino", "onnxruntime" or "tensorrt"; None for the first one that can run here.
        threads: Processor threads; None for all.
        options: Further options of the engine, such as its precision and streams.

    Raises:
        InvalidInputError: If the folder is no bundle, is damaged, or lacks a component that sampling needs.
        EngineUnavailableError: If the engine cannot run the bundle on this machine.
        MissingDependencyError: If the engine's package is not installed.

    Examples:
        >>> import diffpress as dp
        >>> with dp.Pipeline(bundle) as pipe:
        ...     images = pipe(labels=1, seeds=range(2))
        >>> images[0].size
        (8, 8)
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        engine: str | None = None,
        threads: int | None = None,
        *,
        options: EngineOptions | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        spec = self.bundle.spec
        for graph in (e.graph for e in spec.conditioning.encoders):
            self.bundle.graph(graph)  # a missing component is reported before any work
        if spec.latent_factor > 1:
            self.bundle.graph(DECODER)
        self._options = (options or EngineOptions()).with_threads(threads)
        self.denoiser = open_engine(self.bundle, engine, options=self._options)
        self.spec = self.bundle.spec_for(self.denoiser.name)
        self._decoder: Engine | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"Pipeline({str(self.bundle.path)!r}, engine={self.denoiser.name!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        labels: int | Sequence[int] | None = None,
        seeds: int | Iterable[int] | None = None,
        steps: int | None = None,
        solver: str | None = None,
        spacing: str | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 8,
        callback: Callable[[Step], None] | None = None,
    ) -> list[Image.Image]:
        """Sample one image per seed; whatever is left out follows the bundle's own sampling plan.

        Args:
            prompt: Text for all images, or one text per image, for models conditioned on text.
            negative_prompt: What the images should not show; needs guidance.
            labels: The class of all images, or one class per image; None takes the classes in turn.
            seeds: One seed per image, or a single seed. None takes 0, 1, ... for as many images as there are prompts
                or labels (one if neither is a list). An image depends on its seed, conditioning and plan alone.
            steps: Denoising steps.
            solver: Name of a solver, such as "dpmpp_2m".
            spacing: Timestep spacing, such as "trailing" or "karras".
            guidance: Weight of classifier-free guidance; 1 switches it off.
            size: Height and width in pixels, for models that allow other sizes.
            batch: Images sampled together.
            callback: Called after every step with its `Step`: index, timestep t, and x and x0 float32 [N, C, H, W].
                Sampling then runs step by step, without fused sampling.

        Returns:
            PIL images, in the order of the seeds.

        Raises:
            InvalidInputError: If an argument does not fit the model or the bundle.
        """
        if self._closed:
            raise InvalidInputError(f"{self.bundle.path}: the pipeline is closed; open another one")
        if size is not None and not (isinstance(size, Sequence) and len(size) == 2):
            raise InvalidInputError(f"size {size!r}: give height and width in pixels, as in (512, 768)")
        chosen = _seeds(seeds, prompt, labels)
        spec = self.bundle.spec
        if size is not None:
            spec = resized(spec, size, has_fixed_size(self.bundle))
        spec = self.bundle.spec_for(self.denoiser.name, requested_spec(spec, steps, solver, spacing, guidance))
        check_request(spec.conditioning, prompt=prompt, negative_prompt=negative_prompt, labels=labels)
        conditioning = self.conditions(
            len(chosen),
            spec,
            labels=_per_image(labels, len(chosen), "labels"),
            prompts=_per_image(prompt, len(chosen), "prompts"),
            negatives=_per_image(negative_prompt, len(chosen), "negative prompts"),
        )
        batches = self.images(chosen, conditioning, spec, batch, on_step=callback)
        return [image for images in batches for image in to_pil(images, spec.data_range)]

    def images(
        self,
        seeds: Sequence[int] | np.ndarray,
        conditions: ConditioningInputs,
        spec: DenoiserSpec | None = None,
        batch: int = 8,
        *,
        on_step: Callable[[Step], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Images float32 [B, C, H, W] in the data range, batch by batch, one for each seed.

        `spec` is the bundle's own or one with another plan or size (`resized`). `on_step` is called after every step.
        """
        spec = spec or self.spec
        if on_step is not None:
            batches = generate_batches(self.denoiser, spec, seeds, batch=batch, conditions=conditions, on_step=on_step)
        else:
            batches = in_streams(self.denoiser, spec, seeds, conditions, batch, self._options.streams)
        for samples in batches:
            yield self.decode(samples, spec)

    def conditions(
        self,
        count: int,
        spec: DenoiserSpec | None = None,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        prompts: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
    ) -> ConditioningInputs:
        """Conditioning of `count` samples: `labels` (None: the classes in turn) or `prompts`, one for each sample."""
        spec = spec or self.spec
        if spec.conditioning.kind != "text":
            classes = cycled_labels(spec, count) if labels is None else np.asarray(labels)
            return class_conditioning(spec, classes)
        if prompts is None:
            raise InvalidInputError("the model is conditioned on text: give a prompt")
        guided = is_guided(spec, spec.plan.guidance)
        if negatives is not None and not guided:
            raise InvalidInputError("a negative prompt needs guidance above 1, which this model or plan does without")
        text = _TextEncoders(self.bundle, self._open)
        conditioning, size = spec.conditioning, spec.image_size
        cond = encode(prompts, conditioning, text.encoders, text.tokenizers, size)
        if not guided:
            return ConditioningInputs(cond)
        uncond = unconditional(negatives, count, conditioning, text.encoders, text.tokenizers, size)
        return ConditioningInputs(cond, uncond)

    def decode(self, samples: np.ndarray, spec: DenoiserSpec | None = None) -> np.ndarray:
        """Decode latents into images, one at a time, since a decoder's memory grows with the batch.

        Samples of a model of pixels are returned as they are.
        """
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
        """Open another graph in the denoiser's engine; it runs one batch at a time."""
        return open_engine(self.bundle, self.denoiser.name, graph=graph, options=replace(self._options, streams=1))

    def close(self) -> None:
        """Release the engines."""
        self._closed = True
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
    """Generate batches as `generate_batches` does, `streams` of them at the same time, in the order of the seeds."""
    if streams == 1:
        yield from generate_batches(network, spec, seeds, batch=batch, conditions=conditions)
        return
    from concurrent.futures import ThreadPoolExecutor  # an import of 20 ms that most callers do not need

    seeds, parts = np.asarray(seeds), [slice(start, start + batch) for start in range(0, len(seeds), batch)]

    def sampled(part: slice) -> np.ndarray:
        return generate(network, spec, seeds[part], batch=batch, conditions=conditions.part(part))

    with ThreadPoolExecutor(streams) as pool:
        yield from pool.map(sampled, parts)


def check_request(
    conditioning: Conditioning,
    *,
    prompt: object = None,
    negative_prompt: object = None,
    labels: object = None,
) -> None:
    """Raise InvalidInputError for a prompt or label that this kind of model does not take, or a missing prompt."""
    kind = conditioning.kind
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


def _seeds(seeds: int | Iterable[int] | None, prompt: object, labels: object) -> list[int]:
    """Return one seed per image; without seeds, 0, 1, ... for each prompt or label that was listed."""
    if seeds is None:
        lists = [value for value in (prompt, labels) if isinstance(value, Sequence) and not isinstance(value, str)]
        return list(range(len(lists[0]) if lists else 1))
    try:
        chosen = [int(seeds)] if isinstance(seeds, int | np.integer) else [int(seed) for seed in seeds]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"seeds: expected integers, found {seeds!r}") from error
    if not chosen:
        raise InvalidInputError("seeds: give at least one seed")
    return chosen


def _per_image(value: Any, count: int, what: str) -> Any:
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
    return value is not None and not isinstance(value, str) and hasattr(value, "__len__")


def resized(spec: DenoiserSpec, size: tuple[int, int], fixed: bool = False) -> DenoiserSpec:
    """Return the spec for images of `size` (height, width) in pixels, with its plan shifted for that size.

    `fixed` means that the graph was made for one size. Raises InvalidInputError for a size the model cannot make.
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
    """Return whether the denoiser's graph was made for one height and width, or does not say for which."""
    sample = bundle.manifest["graphs"]["denoiser"].get("inputs", {}).get("sample", {})
    return all(isinstance(side, int) for side in sample.get("shape", ())[2:])


class _TextEncoders:
    """A bundle's text encoders and tokenizers by name, opened when they are needed."""

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
        self._open = partial(open_graph, graph)
        entries = bundle.manifest["graphs"][graph]["inputs"]
        self.inputs: Mapping[str, np.dtype] = {name: np.dtype(entry["dtype"]) for name, entry in entries.items()}

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with closing(self._open()) as engine:
            return engine.run_all(inputs)


def _by(size: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in size)
