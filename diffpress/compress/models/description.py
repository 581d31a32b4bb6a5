"""What an adapter reads from a pipeline's configs: sample shape, conditioning, default steps and guidance."""

from __future__ import annotations

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
    tokenizer = layout.tokenizer(tokenizer_folder)
    tokens = length or int(tokenizer.model_max_length)
    limit = layout.configs[component].get("max_position_embeddings")  # CLIP has one, T5 has none
    if limit and tokens > limit:
        raise InvalidInputError(
            f"{layout.folder / tokenizer_folder}: returns {tokens} tokens, but {component} has {limit} positions; "
            "they come from different models"
        )
    return TextEncoder(component, tokenizer_folder, tokens, int(tokenizer.pad_token_id or 0), lower)


def penultimate(layout: Layout, component: str) -> str:
    """Return the name of the penultimate layer's output of a CLIP text encoder, as SDXL and SD3 use it."""
    return f"{component}.hidden_states.{int(layout.configs[component]['num_hidden_layers']) - 1}"


def text(
    layout: Layout,
    encoders: list[TextEncoder],
    inputs: dict[str, TextInput],
    **flags: bool,
) -> Conditioning:
    """Build the text conditioning; without text encoders only the shapes of the inputs are kept."""
    if not encoders:
        inputs = {name: TextInput(entry.shape, ()) for name, entry in inputs.items()}
    return Conditioning("text", encoders=tuple(encoders), inputs=inputs, **flags)
