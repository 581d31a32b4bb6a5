"""The settings of a pipeline, read from its class: the class is built from the configs alone.

A config file does not hold every setting: the class adds its defaults, and the pipeline's constructor corrects old
files. StableDiffusionPipeline sets `clip_sample` to false, for example. So the components are built without weights,
the pipeline is built of them, and its configs replace those of the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import transformers
from accelerate import init_empty_weights
from torch import nn

from diffpress.compress.sources.layout import DECODERS, DENOISERS, Layout, first_line
from diffpress.compress.sources.pipelines import (
    ENTRIES,
    PIPELINES,
    PipelineDef,
    argument_of,
    arguments_of,
    check_pipeline,
    check_scheduler,
    usual_pipeline,
)
from diffpress.compress.sources.pretrained import DECODER_MODELS, quiet_libraries
from diffpress.runtime.errors import InvalidInputError


@dataclass(frozen=True)
class PipelineSettings:
    """The settings of a pipeline after its constructor.

    Attributes:
        layout: The folder's layout, with complete configs and the pipeline's class in the index.
        scheduler: The scheduler's config with the constructor's corrections; None if the folder has none.
        definition: The pipeline's entry of PIPELINES.
    """

    layout: Layout
    scheduler: dict[str, Any] | None
    definition: PipelineDef


def read_settings(layout: Layout, denoiser: nn.Module, scheduler: dict[str, Any] | None) -> PipelineSettings:
    """Build the pipeline of a folder without weights and return its settings.

    Args:
        layout: The folder's layout.
        denoiser: The denoiser; its parameters may be on the meta device.
        scheduler: The parsed scheduler_config.json, None if there is none.

    Raises:
        InvalidInputError: The pipeline's class, a component, or an entry of its index is not supported, or it cannot be
            built.
    """
    name = layout.pipeline or usual_pipeline(layout)
    check_pipeline(layout, name)
    definition = PIPELINES[name]
    if scheduler is not None and (of_index := layout.class_in_index("scheduler")):
        scheduler = {**scheduler, "_class_name": of_index}
    built = None if scheduler is None else _build_scheduler(scheduler)
    before: dict[str, Any] = {}
    if scheduler is not None and built is not None:
        check_scheduler(layout, name, str(scheduler["_class_name"]), built)
        before = dict(built.config)
    parts = {argument_of(name, DENOISERS): denoiser, "scheduler": built or diffusers.DDIMScheduler()}
    configs = {part: _text_config(layout, part) for part in layout.configs if part != layout.decoder}
    if layout.decoder is not None:
        decoder = _build_decoder(layout, layout.decoder)
        parts[argument_of(name, DECODERS)] = decoder
        configs[layout.decoder] = {**layout.configs[layout.decoder], **decoder.config}
    pipe = _build_pipeline(layout, name, parts)
    entries = {key: value for key, value in pipe.config.items() if key in ENTRIES}
    complete = replace(
        layout,
        config={**layout.config, **denoiser.config},  # type: ignore[dict-item]
        configs=configs,
        index={**entries, **layout.index, "_class_name": name},
    )
    corrected = scheduler if scheduler is None or built is None else _corrected(scheduler, before, pipe.scheduler)
    return PipelineSettings(complete, corrected, definition)


def _build_decoder(layout: Layout, component: str) -> Any:
    where = layout.folder / component / "config.json"
    name = layout.kind_of(component)
    if name not in DECODER_MODELS:
        raise InvalidInputError(
            f"{where}: decoder class '{name}' is not supported (supported: {', '.join(DECODER_MODELS)}); load the "
            "denoiser's folder alone to sample latents"
        )
    with (
        quiet_libraries(),
        _refused(f"{where}: {name} cannot be built from it"),
        init_empty_weights(include_buffers=False),
    ):
        return getattr(diffusers, name).from_config(layout.configs[component])


def _build_scheduler(config: dict[str, Any]) -> Any:
    """Build the scheduler, None if diffusers cannot: `read_scheduler` then says why."""
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is not None and hasattr(cls, "_backends"):  # placeholder for a missing dependency
        cls = diffusers.EulerDiscreteScheduler
    try:
        with quiet_libraries():
            return None if cls is None else cls.from_config(config)
    except Exception:  # torch and diffusers raise many types for invalid settings
        return None


def _build_pipeline(layout: Layout, name: str, parts: dict[str, Any]) -> Any:
    """Build the pipeline; components that its constructor does not read are None."""
    arguments = arguments_of(name)
    empty = [key for key, argument in arguments.items() if argument.default is argument.empty and key not in parts]
    flags = {"requires_safety_checker": False, "add_watermarker": False}
    flags = {key: value for key, value in flags.items() if key in arguments}
    with quiet_libraries(), _refused(f"{layout.folder}: {name} cannot be built from its configs"):
        return getattr(diffusers, name)(**dict.fromkeys(empty), **parts, **flags)


def _corrected(config: dict[str, Any], before: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's config with the entries, or the class, that the pipeline's constructor changed."""
    kind = type(scheduler).__name__
    if kind != config.get("_class_name") and kind == "DDIMScheduler":
        return {**config, "_class_name": kind}
    changed = {key: value for key, value in scheduler.config.items() if before.get(key) != value}
    return {**config, **changed}


def _text_config(layout: Layout, component: str) -> dict[str, Any]:
    """Return a text encoder's config with the defaults of its class."""
    name, config = layout.kind_of(component), layout.configs[component]
    cls = getattr(getattr(transformers, name, None), "config_class", None)
    if cls is None:
        return config  # refused by name when the component is loaded
    with quiet_libraries(), _refused(f"{layout.folder / component / 'config.json'}: {name} cannot be built from it"):
        complete: dict[str, Any] = cls.from_pretrained(layout.folder / component).to_dict()
    return {**config, **complete}


@contextmanager
def _refused(message: str) -> Iterator[None]:
    """Turn every exception of diffusers and transformers into an InvalidInputError that starts with `message`."""
    try:
        yield
    except InvalidInputError:
        raise
    except Exception as error:  # both libraries raise many types for invalid settings
        raise InvalidInputError(f"{message} ({first_line(error)})") from error
