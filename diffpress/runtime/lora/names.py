"""Names of a LoRA's tensors in the layouts of kohya, PEFT and diffusers.

    kohya       lora_unet_mid_block_attentions_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha
                lora_te_text_model_encoder_layers_0_..., lora_te1_..., lora_te2_...
    PEFT        base_model.model.mid_block....to_q.lora_A.weight, .lora_B.weight
    diffusers   unet.mid_block....to_q.lora_A.weight, text_encoder.text_model...., also .lora.down.weight
                unet.mid_block....attn1.processor.to_q_lora.down.weight of older versions

Each is a layer's name, the *stem*, and a suffix. `stems` lists every stem of every layer that has slots. U-Nets in
kohya's layout also have the names of the network that Stability AI published (input_blocks_4_1_...).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

DOWN, UP, ALPHA = "down", "up", "alpha"

# suffix of a tensor's name -> what it is; the longest that fits counts
SUFFIXES = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_A.default.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora_down.weight": DOWN,
    ".lora_up.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    "_lora.down.weight": DOWN,
    "_lora.up.weight": UP,
    ".alpha": ALPHA,
}
PEFT = "base_model.model."
TEXT = "text_model."  # transformers names a CLIP text model's layers with or without it, depending on its version
Layer = tuple[str, str]  # graph, layer


def split_name(name: str) -> tuple[str, str] | None:
    """Return the stem of a tensor's name and what it is, DOWN, UP or ALPHA; None if it is not part of a LoRA."""
    suffix = max((end for end in SUFFIXES if name.endswith(end)), key=len, default="")
    return (name.removesuffix(suffix).removeprefix(PEFT), SUFFIXES[suffix]) if suffix else None


def stems(component: str, layers: Iterable[str], encoders: Mapping[str, Iterable[str]]) -> dict[str, Layer]:
    """Return every stem -> (graph, layer).

    Args:
        component: The denoiser's folder in its pipeline, 'unet' or 'transformer'.
        layers: The denoiser's layers.
        encoders: Layers of the text encoders, by graph.
    """
    found: dict[str, Layer] = {}
    layers = list(layers)
    stability = stability_names(layers) if component == "unet" else {}
    for layer in layers:
        target = ("denoiser", layer)
        dotted = {layer, *_of_processor(layer)}
        flat = {layer.replace(".", "_"), *([stability[layer].replace(".", "_")] if layer in stability else [])}
        # kohya calls transformers 'unet' as well
        prefixes = {"lora_unet_", f"lora_{component}_"}
        found |= dict.fromkeys((*dotted, *(f"{component}.{name}" for name in dotted)), target)
        found |= dict.fromkeys((f"{prefix}{name}" for prefix in prefixes for name in flat), target)
    for number, graph in enumerate(sorted(encoders), 1):
        flat_prefixes = [f"lora_te{number}_", *(["lora_te_"] if number == 1 else []), f"lora_{graph}_"]
        for layer in encoders[graph]:
            bare = layer.removeprefix(TEXT)
            for name in (bare, f"{TEXT}{bare}"):
                found[f"{graph}.{name}"] = (graph, layer)
                found |= dict.fromkeys(
                    (f"{prefix}{name.replace('.', '_')}" for prefix in flat_prefixes), (graph, layer)
                )
    return found


def _of_processor(layer: str) -> list[str]:
    """Return the name of an attention's layer in files of older diffusers: attn1.to_q -> attn1.processor.to_q."""
    match = re.fullmatch(r"(.*)\.(to_q|to_k|to_v|to_out)(\.0)?", layer)
    return [f"{match[1]}.processor.{match[2]}"] if match else []


# --- Stability AI's names ----------------------------------------------------------------------------------------

# layers of a residual block
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def stability_names(layers: Iterable[str]) -> dict[str, str]:
    """Return the layers of a U-Net -> their names in the original layout, 'input_blocks.4.1.transformer_blocks...'."""
    layers = list(layers)
    blocks = [match for layer in layers if (match := BLOCK.fullmatch(layer))]
    # resnets of a block in the downward path; the upward path has one more
    each = 1 + max((int(block[4]) for block in blocks if block[1] == "down" and block[3] in MEMBERS), default=0)
    attended = {int(block[2]) for block in blocks if block[1] == "up" and block[3] == "attentions"}
    named = {layer: OUTER[layer] for layer in layers if layer in OUTER}
    for block in blocks:
        named[block[0]] = _block_name(block, each, attended)
    for match in (MIDDLE.fullmatch(layer) for layer in layers):
        if match:
            index = 1 if match[1] == "attentions" else 2 * int(match[2])
            named[match[0]] = f"middle_block.{index}.{_inner(match[1], match[3])}"
    return named


MEMBERS = ("resnets", "attentions")


def _block_name(match: re.Match[str], each: int, attended: set[int]) -> str:
    side, number, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(number + 1) * (each + 1)}.0.op"
        return f"input_blocks.{1 + number * (each + 1) + index}.{MEMBERS.index(kind)}.{_inner(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{(number + 1) * (each + 1) - 1}.{1 + (number in attended)}.conv"
    return f"output_blocks.{number * (each + 1) + index}.{MEMBERS.index(kind)}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return RESNET.get(rest, rest) if kind == "resnets" else rest
