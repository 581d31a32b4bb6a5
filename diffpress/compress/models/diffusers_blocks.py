"""The parts that diffusers' denoisers are built of, and what may shrink inside each; shared by the families' adapters.

Nothing of the residual trunk is listed: its width is tied to layer norms, adaptive-norm chunks, positional
embeddings and skips. What shrinks lies inside one branch, between the layers that write it and those that read it:

    FeedForward                net[0].proj out (GEGLU: both halves [2 * C], same index in each) -> net[2] in
    ResnetBlock2D              conv1 out, time_emb_proj out (scale_shift: both halves), norm2 -> conv2 in
    Attention, FluxAttention   heads: to_q, to_k, to_v out -> to_out[0] in; where text attends jointly also
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
    """One side of one layer of a coupled group: index i of the group is its positions
    offset + i * width ... offset + (i + 1) * width - 1. Side 'norm' is a GroupNorm's channels, side 'heads' the
    attribute that counts an attention's heads.
    """

    layer: Any
    side: Literal["out", "in", "norm", "heads"]
    offset: int = 0
    width: int = 1


@dataclass(frozen=True)
class Coupled:
    """`channels` indices (channels, or whole heads) that every member loses together; where `norm_groups` is above 1,
    equally many from each of so many runs. The groups of one list share no side of a layer.
    """

    members: tuple[Member, ...]
    channels: int
    norm_groups: int = 1


def attentions(model: nn.Module) -> list[Coupled]:
    """Each attention's heads, one index a head.

    Left alone: grouped queries (fewer key heads than query heads), and text keys that are added to self-attention
    (`AttnAddedKVProcessor2_0` needs heads * head_dim to be the trunk's width).
    """
    found = []
    for module in model.modules():
        if isinstance(module, FluxSingleTransformerBlock):
            found.append(_heads(module.attn, [module.proj_out]))
        elif isinstance(module, (Attention, FluxAttention)) and _has_whole_heads(module):
            found.append(_heads(module, _readers(module)))
    return found


def residual_outputs(model: nn.Module) -> list[str]:
    """What writes a U-Net's stream and its skips, beside the convolutions that change the resolution: the first
    convolution, and the blocks that add their branch to their input.
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
    """The inner widths that can shrink, as they stand: ask again after heads have gone."""
    return [
        inner(module)
        for module in model.modules()
        for kind, inner in ((FeedForward, _feed_forward), (ResnetBlock2D, _resnet), (FluxSingleTransformerBlock, _mlp))
        if isinstance(module, kind)
    ]


def refresh_(model: nn.Module) -> None:
    """Stored sizes after the layers' widths; `heads` itself goes with the heads, and is recorded as a width."""
    for module in model.modules():
        if isinstance(module, (Attention, FluxAttention)):
            module.inner_dim = module.to_q.out_features
        if isinstance(module, Attention):
            module.inner_kv_dim = (module.to_k or module.add_k_proj).out_features
            module.sliceable_head_dim = module.heads
        if isinstance(module, FluxSingleTransformerBlock):
            module.mlp_hidden_dim, reader = module.proj_mlp.out_features, cast(Any, module.proj_out)
            # where tensor parallelism splits the concatenated columns
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
    """A linear layer that writes `channels` outputs once, or twice in a row as two halves."""
    return tuple(Member(layer, "out", offset) for offset in range(0, layer.out_features, channels))


def _heads(attention: Any, readers: list[Any]) -> Coupled:
    width = attention.to_q.out_features // attention.heads
    writers = [attention.to_q, attention.to_k, attention.to_v]
    if attention.added_kv_proj_dim is not None:
        writers += [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
    members = [Member(layer, "out", width=width) for layer in writers]
    members += [Member(layer, "in", width=width) for layer in readers]
    return Coupled((*members, Member(attention, "heads")), attention.heads)


def _has_whole_heads(attention: Any) -> bool:
    joint = getattr(attention, "add_q_proj", None) is not None
    widths = {None if layer is None else layer.out_features for layer in (attention.to_k, attention.to_v)}
    whole = widths == {attention.to_q.out_features} and (joint or attention.added_kv_proj_dim is None)
    return whole and bool(_readers(attention))


def _readers(attention: Any) -> list[Any]:
    """What reads an attention's output: none where a parent does (Flux's single block), two where text has its own."""
    out, text_out = getattr(attention, "to_out", None), getattr(attention, "to_add_out", None)
    return [layer for layer in (None if out is None else out[0], text_out) if layer is not None]
