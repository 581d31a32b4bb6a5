"""The pipeline classes of diffusers whose sampling is followed, and what a folder of such a class may hold.

`PIPELINES` lists the classes. Another class, a component that such a class does not have, an unknown entry of
model_index.json, or a scheduler that the pipeline does not work with is refused by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import diffusers

from diffpress.compress.sources.layout import DECODERS, INDEX, Layout
from diffpress.runtime.errors import InvalidInputError

SCALED = ("scaling_factor",)
SHIFTED = ("scaling_factor", "shift_factor")
NORMALIZED = ("scaling_factor", "latents_mean", "latents_std")
# they check the finished image, or take part in sampling only if the caller passes an image
HARMLESS = ("safety_checker", "feature_extractor", "image_encoder")
# entries of model_index.json besides components, with the values that are followed; (): every value
ENTRIES: dict[str, tuple[Any, ...]] = {
    "force_zeros_for_empty_prompt": (True, False),
    "id2label": (),
    "requires_safety_checker": (),
    "add_watermarker": (None, False),
}


@dataclass(frozen=True)
class PipelineDef:
    """A pipeline class of diffusers whose sampling is followed.

    Attributes:
        denoiser: Class of its denoiser.
        decoding: Entries of the decoder's config that it applies to the latents; the others have no effect on them.
        schedulers: Classes of schedulers that it works with; () for all that diffpress supports.
        scales_samples: Whether it scales the initial noise and the network's input, for schedulers whose samples grow
            with sigma.
        scales_late: Whether it scales the noise after it sets the timesteps, to the noise level of the first one.
    """

    denoiser: str
    decoding: tuple[str, ...] = SCALED
    schedulers: tuple[str, ...] = ()
    scales_samples: bool = True
    scales_late: bool = True


PIPELINES: dict[str, PipelineDef] = {
    "DDPMPipeline": PipelineDef("UNet2DModel", decoding=()),
    "DDIMPipeline": PipelineDef("UNet2DModel", decoding=()),
    "LDMPipeline": PipelineDef("UNet2DModel", scales_late=False),
    "StableDiffusionPipeline": PipelineDef("UNet2DConditionModel"),
    "StableDiffusionXLPipeline": PipelineDef("UNet2DConditionModel", decoding=NORMALIZED),
    "StableDiffusionInpaintPipeline": PipelineDef("UNet2DConditionModel"),
    "StableDiffusionXLInpaintPipeline": PipelineDef("UNet2DConditionModel", decoding=NORMALIZED),
    "LatentConsistencyModelPipeline": PipelineDef("UNet2DConditionModel", schedulers=("LCMScheduler",)),
    "DiTPipeline": PipelineDef("DiTTransformer2DModel", scales_samples=False),
    "PixArtAlphaPipeline": PipelineDef("PixArtTransformer2DModel"),
    "PixArtSigmaPipeline": PipelineDef("PixArtTransformer2DModel"),
    "StableDiffusion3Pipeline": PipelineDef("SD3Transformer2DModel", decoding=SHIFTED, scales_samples=False),
    "FluxPipeline": PipelineDef("FluxTransformer2DModel", decoding=SHIFTED, scales_samples=False),
    "FluxFillPipeline": PipelineDef("FluxTransformer2DModel", decoding=SHIFTED, scales_samples=False),
}
INPAINTING_CHANNELS = 9  # of a U-Net: latents, mask, and latents of the masked image
PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline")


def usual_pipeline(layout: Layout) -> str:
    """Return the pipeline that a denoiser without model_index.json is used in."""
    if layout.kind == "UNet2DModel":
        return "DDPMPipeline" if layout.decoder is None else "LDMPipeline"
    inpaints = "Inpaint" if layout.config.get("in_channels") == INPAINTING_CHANNELS else ""
    if layout.config.get("addition_embed_type") == "text_time":
        return f"StableDiffusionXL{inpaints}Pipeline"
    if layout.config.get("time_cond_proj_dim") is not None:
        return "LatentConsistencyModelPipeline"
    if layout.kind == "UNet2DConditionModel":
        return f"StableDiffusion{inpaints}Pipeline"
    return next(name for name, definition in PIPELINES.items() if definition.denoiser == layout.kind)


def check_pipeline(layout: Layout, name: str) -> None:
    """Check that a folder can be sampled as this pipeline class samples.

    Raises:
        InvalidInputError: The class, a component or an entry of the index is not supported.
    """
    _check_class(layout, name)
    _check_components(layout, name)
    _check_entries(layout, name)


def _check_class(layout: Layout, name: str) -> None:
    where = layout.folder / INDEX
    if name not in PIPELINES:
        raise InvalidInputError(
            f"{where}: pipeline class '{name}' is not supported, it may sample in another way (supported: "
            f"{', '.join(PIPELINES)}); load its folder {layout.denoiser.name}/ alone, or set _class_name to the base "
            "pipeline to sample without the additions"
        )
    if PIPELINES[name].denoiser != layout.kind:
        raise InvalidInputError(
            f"{where}: _class_name {name} needs a {PIPELINES[name].denoiser}, but {layout.denoiser / 'config.json'} is "
            f"of class '{layout.kind}'; they come from different models"
        )


def _check_components(layout: Layout, name: str) -> None:
    """Check that the class of the pipeline has every component of the folder."""
    listed = [key for key, value in layout.index.items() if isinstance(value, list) and not key.startswith("_")]
    there = [key for key in listed if any(layout.index[key])]  # [null, null] is a component that is not there
    known = {*arguments_of(name), *HARMLESS}
    if not layout.index:
        there = list(layout.configs)
        known |= set(DECODERS) if layout.decoder is not None else set()
    foreign = next((key for key in there if key not in known), None)
    if foreign is not None:
        raise InvalidInputError(
            f"{layout.folder / (INDEX if layout.index else '')}: {name} has no component '{foreign}', so it is "
            f"not supported; remove it to sample without it, or load the folder {layout.denoiser.name}/ alone"
        )


def _check_entries(layout: Layout, name: str) -> None:
    """Check that every entry of the index besides components has a value that is followed."""
    for key, value in layout.index.items():
        if key.startswith("_") or isinstance(value, list):
            continue
        if key not in ENTRIES and value not in (None, False):
            raise InvalidInputError(
                f"{layout.folder / INDEX}: {key} = {value!r} is not an entry that diffpress knows for {name}; remove "
                "it if it does not change the images"
            )
        if ENTRIES.get(key) and value not in ENTRIES[key]:
            supported = ", ".join(map(repr, ENTRIES[key]))
            raise InvalidInputError(
                f"{layout.folder / INDEX}: {key} = {value!r} is not supported; supported values: {supported}"
            )


def check_scheduler(layout: Layout, name: str, kind: str, scheduler: Any) -> None:
    """Check that a pipeline class supports a scheduler of class `kind`.

    Raises:
        InvalidInputError: It does not.
    """
    definition = PIPELINES[name]
    where = f"{layout.folder / INDEX}: {name} does not work with a scheduler of class {kind}"
    if definition.schedulers and kind not in definition.schedulers:
        raise InvalidInputError(f"{where}; use {', '.join(definition.schedulers)}")
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0:
        return  # its samples do not grow with sigma
    if not definition.scales_samples:
        raise InvalidInputError(f"{where}: it does not scale its samples; use the class of the published folder")
    spaced = inspect.signature(type(scheduler)).parameters.keys() & {"timestep_spacing"}  # EDM's have no spacings
    if not definition.scales_late and spaced and scheduler.config.timestep_spacing == "leading":
        raise InvalidInputError(
            f"{where} and timestep_spacing 'leading': it scales the noise for the last timestep of the noise schedule, "
            "where that spacing does not start; use 'trailing' or 'linspace'"
        )


def argument_of(name: str, roles: tuple[str, ...]) -> str:
    """Return the argument of a pipeline's constructor that takes a component of these names."""
    return next(argument for argument in roles if argument in arguments_of(name))


def arguments_of(name: str) -> dict[str, inspect.Parameter]:
    """Return the arguments of a pipeline's constructor: its components and flags."""
    return dict(inspect.signature(getattr(diffusers, name)).parameters)
