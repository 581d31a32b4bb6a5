"""What an adapter reads off a pipeline's configs: a sample's shape, the conditioning, and how it is usually run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput
from diffpress.runtime.errors import InvalidInputError


@dataclass(frozen=True)
class Description:
    """`sample_shape` is (C, H, W) of what is denoised; `size_multiple` as in DenoiserSpec; `steps` and `guidance` are
    the defaults of the family's diffusers pipeline. `own_sigmas`: that pipeline lays out a flow's timesteps itself.
    """

    sample_shape: tuple[int, int, int]
    conditioning: Conditioning = field(default_factory=Conditioning)
    size_multiple: int = 1
    steps: int = 50
    guidance: float = 1.0
    own_sigmas: bool | None = None


def square(channels: Any, size: Any) -> tuple[int, int, int]:
    """(C, H, W) from a config's channels and its sample size, one number or two."""
    height, width = (size, size) if isinstance(size, int) else (int(side) for side in size)
    return int(channels), int(height), int(width)


def text_encoder(layout: Layout, part: str, length: int | None = None, lower: bool = False) -> TextEncoder:
    """How prompts reach the text encoder `part`; `length` None takes the tokenizer's own limit."""
    tokenizer_folder = dict(layout.encoders)[part]
    tokenizer = layout.tokenizer(tokenizer_folder)
    tokens = length or int(tokenizer.model_max_length)
    limit = layout.configs[part].get("max_position_embeddings")  # CLIP has one, T5 has none
    if limit and tokens > limit:
        raise InvalidInputError(
            f"{layout.folder / tokenizer_folder}: gives {tokens} tokens, {part} has positions for {limit}; "
            "they do not belong together"
        )
    return TextEncoder(part, tokenizer_folder, tokens, int(tokenizer.pad_token_id or 0), lower)


def penultimate(layout: Layout, part: str) -> str:
    """The output of the last layer but one of a CLIP text encoder, as SDXL and SD3 use it."""
    return f"{part}.hidden_states.{int(layout.configs[part]['num_hidden_layers']) - 1}"


def text(
    layout: Layout,
    encoders: list[TextEncoder],
    inputs: dict[str, TextInput],
    **flags: bool,
) -> Conditioning:
    """Text conditioning; a denoiser that came without its text encoders keeps the inputs' shapes alone."""
    if not encoders:
        inputs = {name: TextInput(entry.shape, ()) for name, entry in inputs.items()}
    return Conditioning("text", encoders=tuple(encoders), inputs=inputs, **flags)
