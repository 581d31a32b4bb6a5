"""Adapter of diffusers' `FluxTransformer2DModel`: FLUX.1 and FLUX.1 Fill (Black Forest Labs 2024).

The network works on tokens of 2 x 2 latent cells. Packing, unpacking and position ids are part of the graph, so that
the sample is [B, C, H, W] as for every other model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpress.compress.models import diffusers_blocks, removable_blocks
from diffpress.compress.models.description import Description, check_task, text, text_encoder
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.models.feature_cuts import STREAMS, Cut
from diffpress.compress.models.transformer import layers_named, outer_cuts, present_blocks
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import MASKED_IMAGE, TextInput

PACK = 2
T5_LENGTH = 512
FILL = "FluxFillPipeline"
TASKS = {128: "control by an image (depth, edges)", 384: "inpainting (Fill)"}
CELLS = 128  # default latent height and width: the config has none


def describe(layout: Layout) -> Description:
    """Read sample shape, conditioning and defaults from the pipeline's configs."""
    config = layout.config
    channels = config["out_channels"] or config["in_channels"]
    fills = layout.pipeline == FILL and config["in_channels"] == 2 * channels + PACK**2 * _pixels_per_cell(layout)
    if not fills:
        check_task(layout, config["in_channels"], channels, TASKS)
    clip = [text_encoder(layout, name) for name, _ in layout.encoders if name == "text_encoder"]
    t5 = [text_encoder(layout, name, T5_LENGTH) for name, _ in layout.encoders if name == "text_encoder_2"]
    inputs = {
        "encoder_hidden_states": TextInput(
            (T5_LENGTH, int(config["joint_attention_dim"])), (("text_encoder_2.last_hidden_state",),)
        ),
        "pooled_projections": TextInput((int(config["pooled_projection_dim"]),), (("text_encoder.pooler_output",),)),
    }
    guided = bool(config["guidance_embeds"])
    conditioning = text(layout, clip + t5, inputs, guidance_input=guided, inpainting="pixel_mask" if fills else "")
    shape = (int(channels) // PACK**2, CELLS, CELLS)
    # the variant without a guidance input is distilled to few steps (schnell)
    defaults = (50, 30.0) if fills else (28, 3.5) if guided else (4, 1.0)
    return Description(shape, conditioning, PACK, *defaults, pipeline_sigmas=True)


def _pixels_per_cell(layout: Layout) -> int:
    """Return the pixels of a latent cell, each of which has a channel of the mask."""
    levels = 0 if layout.decoder is None else len(layout.configs[layout.decoder]["block_out_channels"])
    return 4 ** max(levels - 1, 0)


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate the network on [B, C, H, W]."""
    sample, text_states = inputs["sample"], inputs["encoder_hidden_states"]
    rows, columns = sample.shape[2] // PACK, sample.shape[3] // PACK
    read = torch.cat([sample, inputs[MASKED_IMAGE]], dim=1) if MASKED_IMAGE in inputs else sample
    out: torch.Tensor = model(
        pack(read),
        encoder_hidden_states=text_states,
        pooled_projections=inputs["pooled_projections"],
        timestep=inputs["timestep"] / 1000,
        img_ids=positions(rows, columns, sample),
        txt_ids=torch.zeros(text_states.shape[1], 3, dtype=sample.dtype, device=sample.device),
        guidance=inputs.get("guidance"),
        return_dict=False,
    )[0]
    return unpack(out, rows, columns)


def pack(sample: torch.Tensor) -> torch.Tensor:
    """Pack [B, C, H, W] into tokens [B, H W / 4, 4 C], each a 2 x 2 cell."""
    batch, channels, height, width = sample.shape
    cells = sample.reshape(batch, channels, height // PACK, PACK, width // PACK, PACK)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // PACK) * (width // PACK), channels * PACK**2)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Invert `pack`."""
    cells = tokens.reshape(tokens.shape[0], rows, columns, -1, PACK, PACK)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, rows * PACK, columns * PACK)


def positions(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return the position ids (0, row, column) of every token, [rows * columns, 3]."""
    row = torch.arange(rows, dtype=like.dtype, device=like.device)[:, None].expand(rows, columns)
    column = torch.arange(columns, dtype=like.dtype, device=like.device)[None].expand(rows, columns)
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(rows * columns, 3)


def blocks(model: Any) -> list[str]:
    """Return the double-stream and the single-stream blocks."""
    double = [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
    return double + [f"single_transformer_blocks.{i}" for i in range(len(model.single_transformer_blocks))]


def cache_cuts(model: Any) -> dict[str, Cut]:
    """Return the cuts of both streams, see `outer_cuts`."""
    return outer_cuts(present_blocks(model, blocks(model)), STREAMS)


def sensitive_layers(model: nn.Module) -> list[str]:
    """Return the embedding, modulation and output layers."""
    outer = ("x_embedder", "context_embedder", "time_text_embed.", "norm_out.", "proj_out")
    return layers_named(model, outside=outer, inside=("norm.", "norm1.", "norm1_context."))


ADAPTER = Adapter(
    describe=describe,
    forward=forward,
    resizable=True,
    blocks=blocks,
    sensitive_layers=sensitive_layers,
    attentions=diffusers_blocks.attentions,
    coupled=diffusers_blocks.coupled,
    removable_blocks=removable_blocks.transformer_blocks,
    refresh_=diffusers_blocks.refresh_,
    cache_cuts=cache_cuts,
)
