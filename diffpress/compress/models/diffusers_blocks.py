"""Prunable widths inside the blocks of diffusers' denoisers; shared by the family adapters.

These are widths inside one branch of the residual stream, between the layers that write and read them. The width of
the stream itself is tied to layer norms, adaptive-norm chunks, position embeddings and skip connections; it is found by
a trace (pruning/channel_groups.py).

    FeedForward                net[0].proj out (GEGLU: both halves [2 * C], same index in each) -> net[2] in
    ResnetBlock2D              conv1 out, time_emb_proj out (scale_shift: both halves), norm2 -> conv2 in
    Attention, FluxAttention   heads: to_q, to_k, to_v out -> to_out[0] in; with joint text attention also
                               add_q_proj, add_k_proj, add_v_proj out -> to_add_out in, the same heads in both streams
    Flux's single block        heads: to_q, to_k, to_v out -> proj_out in, its first columns [heads * head_dim];
                               proj_mlp out -> proj_out in, the columns that follow
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from torch import nn


@dataclass(frozen=True)
class Member:
    """One side of a layer in a coupled group.

    Index i of the group corresponds to positions offset + i * width ... offset + (i + 1) * width - 1. Side 'norm' means
    the channels of a GroupNorm, side 'heads' the `heads` attribute of an attention.
    """

    layer: Any
    side: Literal["out", "in", "norm", "heads"]
    offset: int = 0
    width: int = 1


@dataclass(frozen=True)
class Coupled:
    """A coupled group: `channels` indices (channels or heads) that are removed from all members together.

    If `norm_groups` > 1, the indices form that many contiguous runs, and equally many are removed from each. The groups
    of one list share no side of a layer.
    """

    members: tuple[Member, ...]
    channels: int
    norm_groups: int = 1


def attentions(model: nn.Module) -> list[Coupled]:
    """Return the heads of each attention, one index per head.

    Excluded: grouped-query attention (fewer key heads than query heads), and text keys added to self-attention
    (`AttnAddedKVProcessor2_0` requires heads * head_dim to equal the width of the residual stream).
    """
    found = []
    for module in model.modules():
        if isinstance(module, FluxSingleTransformerBlock):
            found.append(_heads(module.attn, [module.proj_out]))
        elif isinstance(module, (Attention, FluxAttention)) and _has_prunable_heads(module):
            found.append(_heads(module, _readers(module)))
    return found


def residual_outputs(model: nn.Module) -> list[str]:
    """Return the names of the modules that write a U-Net's residual stream and skip connections.

    These are the first convolution and the blocks that add their branch to their input; resampling convolutions are
    not included.
    """
    sums = (ResnetBlock2D, Transformer2DModel)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, sums)
        or name == "conv_in"
        or (isinstance(module, Attention) and module.residual_connection)
    ]


def coupled(model: nn.Module) -> list[Coupled]:
    """Return the inner widths that can shrink; call it again after removing heads, which changes the offsets."""
    return [
        inner(module)
        for module in model.modules()
        for kind, inner in ((FeedForward, _feed_forward), (ResnetBlock2D, _resnet), (FluxSingleTransformerBlock, _mlp))
        if isinstance(module, kind)
    ]


def refresh_(model: nn.Module) -> None:
    """Update stored sizes to the layer widths; `heads` is updated during pruning and recorded as a width."""
    for module in model.modules():
        if isinstance(module, (Attention, FluxAttention)):
            module.inner_dim = module.to_q.out_features
        if isinstance(module, Attention):
            module.inner_kv_dim = (module.to_k or module.add_k_proj).out_features
            module.sliceable_head_dim = module.heads
        if isinstance(module, FluxSingleTransformerBlock):
            module.mlp_hidden_dim, reader = module.proj_mlp.out_features, cast(Any, module.proj_out)
            # where tensor parallelism splits the concatenated columns of proj_out
            reader._tp_packed_row_blocks = [module.attn.to_q.out_features, module.mlp_hidden_dim]


def _feed_forward(block: Any) -> Coupled:
    writer, reader = block.net[0].proj, block.net[2]
    return Coupled((*_outputs(writer, reader.in_features), Member(reader, "in")), reader.in_features)


def _resnet(block: Any) -> Coupled:
    channels = block.conv1.out_channels
    time = () if block.time_emb_proj is None else _outputs(block.time_emb_proj, channels)
    members = (Member(block.conv1, "out"), *time, Member(block.norm2, "norm"), Member(block.conv2, "in"))
    return Coupled(members, channels, block.norm2.num_groups)


def _mlp(block: Any) -> Coupled:
    reader = Member(block.proj_out, "in", offset=block.attn.to_q.out_features)
    return Coupled((Member(block.proj_mlp, "out"), reader), block.proj_mlp.out_features)


def _outputs(layer: nn.Linear, channels: int) -> tuple[Member, ...]:
    """Return the output members of a linear layer that writes `channels` outputs once, or twice as two halves."""
    return tuple(Member(layer, "out", offset) for offset in range(0, layer.out_features, channels))


def _heads(attention: Any, readers: list[Any]) -> Coupled:
    width = attention.to_q.out_features // attention.heads
    writers = [attention.to_q, attention.to_k, attention.to_v]
    if attention.added_kv_proj_dim is not None:
        writers += [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
    members = [Member(layer, "out", width=width) for layer in writers]
    members += [Member(layer, "in", width=width) for layer in readers]
    return Coupled((*members, Member(attention, "heads")), attention.heads)


def _has_prunable_heads(attention: Any) -> bool:
    joint = getattr(attention, "add_q_proj", None) is not None
    widths = {None if layer is None else layer.out_features for layer in (attention.to_k, attention.to_v)}
    prunable = widths == {attention.to_q.out_features} and (joint or attention.added_kv_proj_dim is None)
    return prunable and bool(_readers(attention))


def _readers(attention: Any) -> list[Any]:
    """Return the layers that read an attention's output: none if the parent does, two if text has its own."""
    out, text_out = getattr(attention, "to_out", None), getattr(attention, "to_add_out", None)
    return [layer for layer in (None if out is None else out[0], text_out) if layer is not None]
