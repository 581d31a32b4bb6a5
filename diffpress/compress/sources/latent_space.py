"""How latents are decoded: scale, shift and size of the latent space, from the decoder's config.

    image = decode(latent / latent_scale + latent_shift)          DenoiserSpec
    image = decode(latent * latents_std / scaling_factor + latents_mean)      pipelines that normalize latents (SDXL)

Each pipeline applies only some of the entries, `PipelineDef.decoding`; the others have no effect in diffusers either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpress.compress.sources.pipeline_settings import PipelineSettings
from diffpress.runtime.errors import InvalidInputError


def read_latent_space(settings: PipelineSettings, channels: int) -> dict[str, Any]:
    """Return scale, shift and factor of the latent space as arguments of a DenoiserSpec; {} in pixel space.

    Args:
        settings: The pipeline's settings.
        channels: Channels of the denoiser's sample.

    Raises:
        InvalidInputError: The denoiser has another number of channels, or an entry is invalid or cannot be followed.
    """
    layout, decoding = settings.layout, settings.definition.decoding
    component = layout.decoder
    if component is None:
        return {}
    where = layout.folder / component / "config.json"
    return latent_space(layout.configs[component], where, decoding, channels)


def latent_space(config: dict[str, Any], where: Path, decoding: tuple[str, ...], channels: int) -> dict[str, Any]:
    """Return scale, shift and factor of the latent space of an autoencoder.

    Args:
        config: The autoencoder's complete config.
        where: The file that it is from.
        decoding: Entries that the pipeline applies, as in PipelineDef.
        channels: Channels of the denoiser's sample.

    Raises:
        InvalidInputError: As in `read_latent_space`.
    """
    # a VQ model quantizes, and so decodes, vectors of its own width
    entry = "vq_embed_dim" if config.get("vq_embed_dim") else "latent_channels"
    if config.get(entry) != channels:
        raise InvalidInputError(
            f"{where}: {entry}: the denoiser has {channels} latent channels, but {where.parent.name} decodes "
            f"{config.get(entry)}; they come from different models"
        )
    scale, shift = _number(config, "scaling_factor", where), 0.0
    if "shift_factor" in decoding:
        shift = _number(config, "shift_factor", where)
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if "latents_mean" in decoding and mean is not None and std is not None:
        shift = _same_in_every_channel(mean, "latents_mean", where)
        scale /= _same_in_every_channel(std, "latents_std", where)
    return {
        "latent_scale": scale,
        "latent_shift": shift,
        "latent_factor": 2 ** (len(config["block_out_channels"]) - 1),
    }


def _number(config: dict[str, Any], entry: str, where: Path) -> float:
    value = config.get(entry)
    if isinstance(value, bool) or not isinstance(value, int | float) or (entry == "scaling_factor" and value == 0):
        raise InvalidInputError(f"{where}: {entry} = {value!r} must be a number that latents can be scaled with")
    return float(value)


def _same_in_every_channel(values: Any, entry: str, where: Path) -> float:
    if not isinstance(values, list | tuple) or len(set(values)) != 1:
        raise InvalidInputError(
            f"{where}: {entry} = {values!r} is supported only with the same number for every channel; load the "
            "denoiser's folder alone to sample latents"
        )
    return float(values[0])
