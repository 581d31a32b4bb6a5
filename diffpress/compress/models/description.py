"""What an adapter reads from a pipeline's configs: sample shape, conditioning, default steps and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput
from diffpress.runtime.errors import InvalidInputError


@dataclass(frozen=True)
class Description:
    """Properties of a denoiser that its pipeline's configs determine.

    Attributes:
        sample_shape: (C, H, W) of a denoised sample.
        conditioning: The network's conditioning inputs.
        size_multiple: As in DenoiserSpec.
        steps: Default of the family's diffusers pipeline.
        guidance: Default of the family's diffusers pipeline.
        pipeline_sigmas: Whether that pipeline passes its own sigmas to a flow scheduler; None: see `read_scheduler`.
    """

    sample_shape: tuple[int, int, int]
    conditioning: Conditioning = field(default_factory=Conditioning)
    size_multiple: int = 1
    steps: int = 50
    guidance: float = 1.0
    pipeline_sigmas: bool | None = None


def square(channels: Any, size: Any) -> tuple[int, int, int]:
    """Return (C, H, W) from a config's channels and sample size (an int or a pair)."""
    height, width = (size, size) if isinstance(size, int) else (int(side) for side in size)
    return int(channels), int(height), int(width)


def sample_size(layout: Layout) -> Any:
    """Return the sample size of a U-Net, which its class leaves open, as an int or a pair.

    Raises:
        InvalidInputError: The config has none.
    """
    size = layout.config.get("sample_size")
    if size is None:
        raise InvalidInputError(
            f"{layout.denoiser / 'config.json'}: sample_size is missing; set it to the size of the samples that the "
            "model was trained on"
        )
    return size


def text_encoder(layout: Layout, component: str, length: int | None = None, lower: bool = False) -> TextEncoder:
    """Describe how prompts are tokenized for the text encoder `component`.

    Args:
        layout: The pipeline's layout.
        component: Name of the text encoder.
        length: Tokens per prompt; None takes the tokenizer's own limit.
        lower: Whether prompts are lowercased.

    Raises:
        InvalidInputError: The text encoder has fewer positions than the prompt has tokens.
    """
    tokenizer_folder = dict(layout.encoders)[component]
    where = layout.folder / tokenizer_folder / "tokenizer_config.json"
    tokenizer = layout.tokenizer(tokenizer_folder)
    tokens = length or token_limit(layout, component)
    limit = layout.configs[component].get("max_position_embeddings")  # CLIP has one, T5 has none
    if limit and tokens > limit:
        raise InvalidInputError(
            f"{where}: model_max_length: returns {tokens} tokens, but {component} has {limit} positions "
            "(max_position_embeddings); they come from different models"
        )
    return TextEncoder(component, tokenizer_folder, tokens, int(tokenizer.pad_token_id or 0), lower)


def token_limit(layout: Layout, component: str) -> int:
    """Return the number of tokens that the tokenizer of a text encoder cuts prompts at."""
    return int(layout.tokenizer(dict(layout.encoders)[component]).model_max_length)


def check_entry(layout: Layout, entry: str, supported: tuple[Any, ...], why: str) -> None:
    """Raise InvalidInputError if an entry of the denoiser's config has none of the supported values."""
    value = layout.config.get(entry)
    if value not in supported:
        values = ", ".join(str(one) for one in supported)
        raise InvalidInputError(
            f"{layout.denoiser / 'config.json'}: {entry} = {value!r} is not supported with a {layout.pipeline} "
            f"(supported: {values}), {why}; load it as a custom module, file.py:weights"
        )


def without_variance(channels: int, out_channels: int) -> int:
    """Return the predicted channels without a learned variance, by the rule of the DiT and PixArt pipelines."""
    return channels if out_channels // 2 == channels else out_channels


def check_task(layout: Layout, channels: Any, out_channels: Any, tasks: Mapping[int, str]) -> None:
    """Raise InvalidInputError, naming the task, if a network reads more or other channels than it denoises.

    Args:
        layout: The pipeline's layout.
        channels: Channels that the network reads.
        out_channels: Channels that it predicts, without a learned variance.
        tasks: Known tasks by the number of channels read.
    """
    if channels != out_channels:
        task = tasks.get(channels, "a task with another input besides the noise, or a learned variance")
        raise InvalidInputError(
            f"{layout.denoiser / 'config.json'}: in_channels {channels} with out_channels {out_channels} is a network "
            f"for {task}, which is not supported in a {layout.pipeline}; use a text-to-image or unconditional model, "
            "or load it as a custom module, file.py:weights"
        )


def penultimate(layout: Layout, component: str) -> str:
    """Return the name of the penultimate layer's output of a CLIP text encoder, as SDXL and SD3 use it."""
    return f"{component}.hidden_states.{int(layout.configs[component]['num_hidden_layers']) - 1}"


def text(
    layout: Layout,
    encoders: list[TextEncoder],
    inputs: dict[str, TextInput],
    zero_negative: bool = False,
    guidance_input: bool = False,
    inpainting: str = "",
) -> Conditioning:
    """Build the text conditioning; without text encoders only the shapes of the inputs are kept."""
    if not encoders:
        inputs = {name: TextInput(entry.shape, ()) for name, entry in inputs.items()}
    return Conditioning(
        "text",
        encoders=tuple(encoders),
        inputs=inputs,
        zero_negative=zero_negative,
        guidance_input=guidance_input,
        inpainting=inpainting,
    )
