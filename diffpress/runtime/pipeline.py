"""An open bundle: prompts, labels or tensors in, images or other samples out, without torch.

    prompt -> text encoders -> conditioning;   noise -> denoiser, step by step -> latent;   latent -> decoder -> image
    image -> encoder -> latent, noised to the level where sampling starts, if one is given (runtime/image_inputs)
    control image -> control network, step by step -> residuals of the denoiser, if one is given

Samples that are not pictures (points, sequences, video, images of 2 channels, latents without a decoder) are arrays.

The engines of the other components are opened when they are needed, and stay open for the next images, except large
text encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.call_arguments import (
    check_negative_prompt,
    check_request,
    chosen_seeds,
    missing_condition,
    per_image,
    tensor_rows,
)
from diffpress.runtime.engines import Engine, open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.image_inputs.control import (
    ControlRequest,
    by_network,
    controlled_spec,
    read_control_request,
)
from diffpress.runtime.image_inputs.control_engines import ControlEngines
from diffpress.runtime.image_inputs.control_networks import Control
from diffpress.runtime.image_inputs.encode import ENCODER, image_start
from diffpress.runtime.image_inputs.request import ImageRequest, read_image_request
from diffpress.runtime.image_inputs.start import ImageStart
from diffpress.runtime.image_inputs.strength import with_strength
from diffpress.runtime.image_size import sized
from diffpress.runtime.io.images import to_pil
from diffpress.runtime.lora.engines import LoraEngines, fill_slots_
from diffpress.runtime.lora.read import read_loras
from diffpress.runtime.lora.scales import DENOISER
from diffpress.runtime.network_inputs import ConditioningInputs, Network, class_conditioning, tensor_conditioning
from diffpress.runtime.outputs import DECODER, has_decoder, makes_pictures, output_shape
from diffpress.runtime.prompts import encode, unconditional
from diffpress.runtime.requested_plan import requested_spec
from diffpress.runtime.sampler import Step, cycled_labels, generate, generate_batches
from diffpress.runtime.spec import DenoiserSpec, is_picture
from diffpress.runtime.text_encoders import TextEncoders

if TYPE_CHECKING:
    from PIL import Image


class Pipeline:
    """An open bundle: call it to sample images. Several threads may call it at the same time.

    Args:
        bundle: The bundle's folder, or a loaded `Bundle`.
        engine: "openvino", "onnxruntime" or "tensorrt"; None for the first one that can run here.
        threads: Processor threads; None for all.
        options: Further options of the engine, such as its precision and streams.
        keep_open: Keep text encoders open that are larger than the denoiser; otherwise they are closed after use. Also
            keep the denoiser's graph without slots for LoRAs open while LoRAs are set, and the other way round.
        public_key: PEM file of the Ed25519 key that the bundle has to be signed with; None requires no signature.
        loras: LoRAs to set, as in `set_loras`.

    Raises:
        InvalidInputError: If the folder is no bundle, is damaged, lacks a component that sampling needs, or has no
            signature of the required key, or a LoRA does not fit.
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
        keep_open: bool = False,
        public_key: str | Path | None = None,
        loras: Mapping[str | Path, float] | None = None,
    ) -> None:
        if not isinstance(bundle, Bundle):
            bundle = load_bundle(bundle, public_key)
        elif public_key is not None:
            bundle = load_bundle(bundle.path, public_key)
        self.bundle = bundle
        spec = self.bundle.spec
        for graph in (e.graph for e in spec.conditioning.encoders):
            self.bundle.graph(graph)  # a missing component is reported before any work
        if spec.latent_factor > 1 and spec.conditioning.encoders:
            self.bundle.graph(DECODER)  # a whole pipeline has one
        self._options = (options or EngineOptions()).with_threads(threads)
        self._keep_open = keep_open
        self._loras, self._chosen = read_loras(self.bundle, loras or {}), dict(loras or {})
        self._denoisers = LoraEngines(self.bundle, engine, self._options, keep_open)
        self.denoiser = self._denoisers.with_loras(self._loras.get(DENOISER, []))
        self.spec = self.bundle.spec_for(self.denoiser.name)
        self._autoencoder: dict[str, Engine] = {}
        self._control: ControlEngines | None = None
        self._text: TextEncoders | None = None
        self._closed = False
        self._opening = Lock()  # threads may share a pipeline

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
        conditioning: Mapping[str, Any] | None = None,
        image: Any = None,
        mask: Any = None,
        strength: float | None = None,
        overlay: bool = False,
        control_image: Any = None,
        control_scale: float | Sequence[float] | None = None,
        control_start: float | Sequence[float] | None = None,
        control_end: float | Sequence[float] | None = None,
        step_cache: bool = True,
    ) -> list[Image.Image] | np.ndarray:
        """Sample one image per seed; whatever is left out follows the bundle's own sampling plan.

        Args:
            prompt: Text for all images, or one text per image, for models conditioned on text.
            negative_prompt: What the images should not show; needs guidance.
            labels: The class of all images, or one class per image; None takes the classes in turn.
            seeds: One seed per image, or a single seed. None takes 0, 1, ... for as many images as there are prompts,
                labels, rows of `conditioning` or images to start from (one if none is a list). An image depends on
                its seed, conditioning, start and plan alone.
            steps: Denoising steps.
            solver: Name of a solver, such as "dpmpp_2m".
            spacing: Timestep spacing, such as "trailing" or "karras".
            guidance: Weight of classifier-free guidance; 1 switches it off.
            size: Height and width in pixels, for models that allow other sizes.
            batch: Images sampled together.
            callback: Called after every step with its `Step`: index, timestep t, and x and x0 float32 [N, ...].
                Sampling then runs step by step, without fused sampling.
            conditioning: Arrays by name, for models conditioned on tensors: [N, ...], or [...] for all images.
            image: What to start from instead of noise: a file, a PIL image or uint8 [H, W, C], or a list with one for
                each seed. Its size is that of the result. Latent models need a bundle with an encoder.
            mask: What is repainted of the image: white. A file, a PIL image, or bool or uint8 [H, W], or a list.
            strength: Share of the steps that is run, above 0 and at most 1; None takes 0.8, with a mask 1.
            overlay: Keep the unmasked pixels of the image exactly.
            control_image: Image for the bundle's control network, given as `image`, and of the size of the result; for
                several networks a list with one for each, or None to leave a network out.
            control_scale: Weight of the control, for all networks or one each; None is 1, and 0 gives exactly the
                result without control.
            control_start: Share of the evaluations after which control begins; None is 0.
            control_end: Share of the evaluations after which it stops; None is 1.
            step_cache: Follow the plan's step cache, if it has one; False evaluates the whole network in every step.

        Returns:
            PIL images, in the order of the seeds. Samples that are not pictures are one array, float32 [N, ...].

        Raises:
            InvalidInputError: If an argument does not fit the model or the bundle.
        """
        if self._closed:
            raise InvalidInputError(f"{self.bundle.path}: the pipeline is closed; open another one")
        if size is not None and not (isinstance(size, Sequence) and len(size) == 2):
            raise InvalidInputError(f"size {size!r}: give height and width in pixels, as in (512, 768)")
        tensors = None if conditioning is None else {name: np.asarray(value) for name, value in conditioning.items()}
        request = read_image_request(image, mask, strength, overlay)
        control_images = by_network(control_image, len(self.bundle.control_networks))
        control = read_control_request(control_images, control_scale, control_start, control_end)
        images = [] if request is None or len(request.pixels) == 1 else [len(request.pixels)]
        images += [] if control is None else control.rows
        chosen = chosen_seeds(seeds, prompt, labels, [*tensor_rows(self.spec, tensors), *images])
        spec = requested_spec(
            sized(self.bundle, size, request, control), steps, solver, spacing, guidance, step_cache=step_cache
        )
        spec = spec if control is None else controlled_spec(spec)
        spec, first = (spec, 0) if request is None else with_strength(spec, request.strength)
        spec = self.bundle.spec_for(self.denoiser.name, spec)
        given = {"prompt": prompt, "negative_prompt": negative_prompt, "labels": labels, "conditioning": conditioning}
        check_request(spec.conditioning, given)
        conditions = self.conditions(
            len(chosen),
            spec,
            labels=per_image(labels, len(chosen), "labels"),
            prompts=per_image(prompt, len(chosen), "prompts"),
            negatives=per_image(negative_prompt, len(chosen), "negative prompts"),
            tensors=tensors,
        )
        if control is not None:
            conditions = replace(conditions, control=self.control(control, len(chosen)))
        start = None if request is None else self.image_start(request, spec, first, len(chosen))
        batches = self.images(chosen, conditions, spec, batch, on_step=callback, start=start)
        if not self.makes_pictures:
            return np.concatenate(list(batches))
        return [image for images in batches for image in to_pil(images, spec.data_range)]

    def set_loras(self, loras: Mapping[str | Path, float] | None) -> None:
        """Set the LoRAs of the following images, in place of those that are set; none or an empty mapping removes all.

        Only the first LoRAs open a graph: other files and scales change its inputs alone. Nothing changes if one is
        refused.

        Args:
            loras: LoRA -> scale. A LoRA is a .safetensors file in kohya's, PEFT's or diffusers' layout, or its folder.

        Raises:
            InvalidInputError: The bundle has no slots or too few, or a LoRA does not fit it completely.
        """
        if self._closed:
            raise InvalidInputError(f"{self.bundle.path}: the pipeline is closed; open another one")
        chosen = read_loras(self.bundle, loras or {})
        self.denoiser = self._denoisers.with_loras(chosen.get(DENOISER, []))
        self._loras, self._chosen = chosen, dict(loras or {})
        if self._text is not None:
            self._text.close_unless(self._follows_loras)

    @property
    def loras(self) -> dict[str | Path, float]:
        """The LoRAs that are set -> their scales."""
        return dict(self._chosen)

    @property
    def makes_pictures(self) -> bool:
        """Whether the samples can be shown as pictures: [C, H, W] with 1, 3 or 4 channels, and no undecoded latents."""
        return makes_pictures(self.bundle)

    def output_shape(self, spec: DenoiserSpec | None = None) -> tuple[int, ...]:
        """Return the shape of one sample after decoding, [C, H, W] for images; `spec` is as in `images`."""
        return output_shape(self.bundle, spec)

    def images(
        self,
        seeds: Sequence[int] | np.ndarray,
        conditions: ConditioningInputs,
        spec: DenoiserSpec | None = None,
        batch: int = 8,
        *,
        on_step: Callable[[Step], None] | None = None,
        start: ImageStart | None = None,
    ) -> Iterator[np.ndarray]:
        """Images float32 [B, C, H, W] in the data range, or other samples [B, ...], batch by batch, one for each seed.

        `spec` is the bundle's own or one with another plan or size (`resized`). `on_step` is called after every step.
        `start` is where sampling from images starts (`image_start`); None starts from noise.
        """
        spec, done = spec or self.spec, 0
        if on_step is not None:
            batches = generate_batches(
                self.denoiser, spec, seeds, batch=batch, conditions=conditions, on_step=on_step, image=start
            )
        else:
            batches = in_streams(self.denoiser, spec, seeds, conditions, batch, self._options.streams, start)
        for samples in batches:
            images, done = self.decode(samples, spec), done + len(samples)
            yield images if start is None else start.part(slice(done - len(samples), done)).overlaid(images)

    def conditions(
        self,
        count: int,
        spec: DenoiserSpec | None = None,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        prompts: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> ConditioningInputs:
        """Conditioning of `count` samples.

        Args:
            count: Number of samples.
            spec: The bundle's own spec or one with another plan or size.
            labels: One class for each sample; None takes the classes in turn.
            prompts: One text for each sample, for models conditioned on text.
            negatives: One negative prompt for each sample.
            tensors: Arrays [count, ...], or [...] for all samples, for models conditioned on tensors;
                `read_conditioning` (runtime/network_inputs.py) reads them from a file.

        Raises:
            InvalidInputError: If something is missing or does not fit the model.
        """
        spec = spec or self.spec
        if spec.conditioning.kind == "tensors":
            if tensors is None:
                raise InvalidInputError(missing_condition(spec.conditioning))
            return tensor_conditioning(spec, count, tensors)
        if spec.conditioning.kind != "text":
            classes = cycled_labels(spec, count) if labels is None else np.asarray(labels)
            return class_conditioning(spec, classes)
        if prompts is None:
            raise InvalidInputError(missing_condition(spec.conditioning))
        guided = is_guided(spec, spec.plan.guidance)
        if negatives is not None:
            check_negative_prompt(spec)
        with self._opening:
            if self._text is None:
                self._text = TextEncoders(self.bundle, self._open, self._keep_open)
        text, conditioning, size = self._text, spec.conditioning, spec.image_size
        cond = encode(prompts, conditioning, text.encoders, text.tokenizers, size)
        if not guided:
            return ConditioningInputs(cond)
        uncond = unconditional(negatives, count, conditioning, text.encoders, text.tokenizers, size)
        return ConditioningInputs(cond, uncond)

    def decode(self, samples: np.ndarray, spec: DenoiserSpec | None = None) -> np.ndarray:
        """Decode latents into images, one at a time, since a decoder's memory grows with the batch.

        Samples are returned as they are if the bundle has no decoder. Pictures are clipped to the data range.
        """
        spec = spec or self.spec
        if not has_decoder(self.bundle):
            return samples
        return decoded(self._half(DECODER), samples, spec)

    def image_start(self, request: ImageRequest, spec: DenoiserSpec, first: int, count: int) -> ImageStart:
        """Return where `count` samples start that are made from images, under the spec's plan from step `first` on.

        Raises:
            InvalidInputError: The bundle has no encoder, or there are neither one nor `count` images.
        """
        return image_start(request, spec, first, count, self._half(ENCODER) if self.bundle.is_latent else None)

    def control(self, request: ControlRequest, count: int) -> Control:
        """Return the control of `count` samples by the images of a request.

        Raises:
            InvalidInputError: LoRAs of the denoiser are set, or as in `ControlEngines`.
        """
        if self._loras.get(DENOISER):
            raise InvalidInputError(
                "control images and LoRAs of the denoiser at the same time are not supported: the graph for control "
                "images has no slots; leave one of them out"
            )
        with self._opening:
            if self._control is None:
                self._control = ControlEngines(self.bundle, self.denoiser.name, self._options)
            return self._control.control(request, count)

    def _half(self, graph: str) -> Callable[[np.ndarray], np.ndarray]:
        """Return the decoder or the encoder of the autoencoder as a function, opened if it is not open yet."""
        with self._opening:
            engine = self._autoencoder.get(graph) or self._autoencoder.setdefault(graph, self._open(graph))
        (name,) = engine.inputs
        return lambda array: engine.run({name: array.astype(engine.inputs[name])})

    def _open(self, graph: str) -> Engine:
        """Open another graph in the denoiser's engine, with its LoRAs; it runs one batch at a time."""
        options, loras = replace(self._options, streams=1), self._loras.get(graph, [])
        engine = open_engine(self.bundle, self.denoiser.name, graph=graph, options=options, lora=bool(loras))
        if loras:
            fill_slots_(self.bundle, engine, loras, graph)
        return engine

    def _follows_loras(self, graph: str, engine: Engine) -> bool:
        """Write the LoRAs into another open graph; return False if it is not in the form that they need."""
        loras = self._loras.get(graph, [])
        if bool(loras) != bool(getattr(engine, "lora", {})):
            return False
        if loras:
            fill_slots_(self.bundle, engine, loras, graph)
        return True

    def close(self) -> None:
        """Release the engines."""
        self._closed = True
        self._denoisers.close()
        for opened in (*self._autoencoder.values(), self._control, self._text):
            if opened is not None:
                opened.close()


def decoded(decode: Callable[[np.ndarray], np.ndarray], samples: np.ndarray, spec: DenoiserSpec) -> np.ndarray:
    """Decode latents [N, ...] one at a time; pictures are clipped to the data range."""
    latents = samples / np.float32(spec.latent_scale) + np.float32(spec.latent_shift)
    found = np.concatenate([decode(latent[None]) for latent in latents])
    return np.clip(found, *spec.data_range) if is_picture(found.shape[1:]) else found


def in_streams(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    conditions: ConditioningInputs,
    batch: int,
    streams: int = 1,
    image: ImageStart | None = None,
) -> Iterator[np.ndarray]:
    """Generate batches as `generate_batches` does, `streams` of them at the same time, in the order of the seeds."""
    if streams == 1:
        yield from generate_batches(network, spec, seeds, batch=batch, conditions=conditions, image=image)
        return
    from concurrent.futures import ThreadPoolExecutor  # an import of 20 ms that most callers do not need

    seeds, parts = np.asarray(seeds), [slice(start, start + batch) for start in range(0, len(seeds), batch)]

    def sampled(part: slice) -> np.ndarray:
        own = None if image is None else image.part(part)
        return generate(network, spec, seeds[part], batch=batch, conditions=conditions.part(part), image=own)

    with ThreadPoolExecutor(streams) as pool:
        yield from pool.map(sampled, parts)
