"""Adapter of diffusers' `FluxTransformer2DModel`: FLUX.1 (Black Forest Labs 2024).

The network works on 2 x 2 cells packed into one token. Packing, unpacking and the positions are made inside the graph,
so that a sample looks like every other model's: [B, C, H, W].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpress.compress.models.description import Description, text, text_encoder
from diffpress.compress.models.diffusers_blocks import attentions as attentions
from diffpress.compress.models.diffusers_blocks import coupled as coupled
from diffpress.compress.models.diffusers_blocks import refresh_ as refresh_
from diffpress.compress.models.transformer import cache_cuts as cache_cuts
from diffpress.compress.models.transformer import layers_named
from diffpress.compress.models.transformer import residual_outputs as residual_outputs
from diffpress.compress.models.transformer import skip_concats as skip_concats
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import TextInput

RESIZABLE = True
PACK = 2
T5_LENGTH = 512
CELLS = 128  # a side, by default: the config does not say


def describe(layout: Layout) -> Description:
    config = layout.config
    clip = [text_encoder(layout, part) for part, _ in layout.encoders if part == "text_encoder"]
    t5 = [text_encoder(layout, part, T5_LENGTH) for part, _ in layout.encoders if part == "text_encoder_2"]
    inputs = {
        "encoder_hidden_states": TextInput(
            (T5_LENGTH, int(config["joint_attention_dim"])), (("text_encoder_2.last_hidden_state",),)
        ),
        "pooled_projections": TextInput((int(config["pooled_projection_dim"]),), (("text_encoder.pooler_output",),)),
    }
    guided = bool(config.get("guidance_embeds"))
    conditioning = text(layout, clip + t5, inputs, guidance_input=guided)
    shape = (int(config["in_channels"]) // PACK**2, CELLS, CELLS)
    # without a guidance input it was distilled to few steps (schnell)
    usual = (28, 3.5) if guided else (4, 1.0)
    return Description(shape, conditioning, PACK, *usual, own_sigmas=True)


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    sample, words = inputs["sample"], inputs["encoder_hidden_states"]
    rows, columns = sample.shape[2] // PACK, sample.shape[3] // PACK
    out: torch.Tensor = model(
        pack(sample),
        encoder_hidden_states=words,
        pooled_projections=inputs["pooled_projections"],
        timestep=inputs["timestep"] / 1000,
        img_ids=positions(rows, columns, sample),
        txt_ids=torch.zeros(words.shape[1], 3, dtype=sample.dtype, device=sample.device),
        guidance=inputs.get("guidance"),
        return_dict=False,
    )[0]
    return unpack(out, rows, columns)


def pack(sample: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H W / 4, 4 C], each token a 2 x 2 cell."""
    batch, channels, height, width = sample.shape
    cells = sample.reshape(batch, channels, height // PACK, PACK, width // PACK, PACK)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // PACK) * (width // PACK), channels * PACK**2)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`."""
    cells = tokens.reshape(tokens.shape[0], rows, columns, -1, PACK, PACK)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, rows * PACK, columns * PACK)


def positions(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """(0, row, column) of every token, [rows columns, 3]."""
    row = torch.arange(rows, dtype=like.dtype, device=like.device)[:, None].expand(rows, columns)
    column = torch.arange(columns, dtype=like.dtype, device=like.device)[None].expand(rows, columns)
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(rows * columns, 3)


def blocks(model: Any) -> list[str]:
    double = [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
    return double + [f"single_transformer_blocks.{i}" for i in range(len(model.single_transformer_blocks))]


def sensitive_layers(model: nn.Module) -> list[str]:
    outer = ("x_embedder", "context_embedder", "time_text_embed.", "norm_out.", "proj_out")
    return layers_named(model, outside=outer, inside=("norm.", "norm1.", "norm1_context."))
