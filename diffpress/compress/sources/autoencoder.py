"""The autoencoder of a pipeline, or the one that is exported in its place, such as a tiny autoencoder (TAESD).

    image = decode(latent / latent_scale + latent_shift)

Scale and shift are those of the autoencoder's own config, as if it were the pipeline's `vae`: TAESD has scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.sources.latent_space import latent_space
from diffpress.compress.sources.layout import first_line, read_layout
from diffpress.compress.sources.pipelines import PIPELINES, usual_pipeline
from diffpress.compress.sources.pretrained import DECODER_MODELS, quiet_libraries
from diffpress.compress.sources.terms import read_terms
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder on disk.

    Attributes:
        folder: Its folder.
        kind: Its class.
        config: Its config.json.
        component: Name of its folder in the pipeline.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    component: str


def autoencoder_of(checkpoint: Checkpoint) -> Autoencoder | None:
    """Return the autoencoder that decodes the checkpoint's latents; None if it came without one."""
    source = checkpoint.source
    layout = None if source.pipeline_folder is None else read_layout(source.pipeline_folder)
    if layout is None or layout.decoder is None:
        return None
    if source.autoencoder is not None:
        config = read_json(source.autoencoder / "config.json", hint="")
        return Autoencoder(source.autoencoder, str(config.get("_class_name")), config, layout.decoder)
    name = layout.decoder
    return Autoencoder(layout.folder / name, layout.kind_of(name), layout.configs[name], name)


def with_decoder(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return the checkpoint with another autoencoder in place of the pipeline's.

    Raises:
        InvalidInputError: There is nothing to replace, its class is not supported, or its latents are others.
    """
    own = autoencoder_of(checkpoint)
    if own is None:
        raise InvalidInputError(f"decoder {folder}: the model has no autoencoder that it could replace; leave it out")
    if checkpoint.component_quantization.get("vae_decoder") is not None:
        raise InvalidInputError(f"decoder {folder}: the checkpoint's own decoder is quantized and cannot be replaced")
    where = folder / "config.json"
    config = read_json(where, hint="give the folder of an autoencoder, with config.json and safetensors")
    kind = str(config.get("_class_name"))
    if kind not in DECODER_MODELS:
        raise InvalidInputError(
            f"{where}: class '{kind}' is no autoencoder that is supported (supported: {', '.join(DECODER_MODELS)})"
        )
    try:
        with quiet_libraries(), init_empty_weights(include_buffers=False):
            complete = {**config, **getattr(diffusers, kind).from_config(config).config}
    except Exception as error:  # torch and diffusers raise many types for invalid settings
        raise InvalidInputError(f"{where}: {kind} cannot be built from it ({first_line(error)})") from error
    assert checkpoint.source.pipeline_folder is not None  # else it has no autoencoder
    layout, spec = read_layout(checkpoint.source.pipeline_folder), checkpoint.spec
    decoding = PIPELINES[layout.pipeline or usual_pipeline(layout)].decoding
    found = latent_space(complete, where, decoding, spec.sample_shape[0])
    if found["latent_factor"] != spec.latent_factor:
        raise InvalidInputError(
            f"{where}: a cell of its latents has {found['latent_factor']} pixels along a side, one of {own.component} "
            f"has {spec.latent_factor}; they come from different models"
        )
    terms = {f"vae_decoder.{name}": text for name, text in read_terms(folder).items()}
    source = replace(checkpoint.source, autoencoder=folder, terms={**checkpoint.source.terms, **terms})
    return checkpoint.evolve(spec=replace(spec, **found), source=source)
