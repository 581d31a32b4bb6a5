"""Adapter of diffusers' `UNet2DConditionModel`: Stable Diffusion 1 and 2, SDXL, and latent consistency models.

A network for inpainting of 9 channels reads the sample, a mask and the latents of the masked image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from diffpress.compress.models import diffusers_blocks, removable_blocks
from diffpress.compress.models.description import (
    Description,
    check_entry,
    check_task,
    penultimate,
    sample_size,
    square,
    text,
    text_encoder,
)
from diffpress.compress.models.families import unet2d
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import MASKED_IMAGE, TextInput
from diffpress.runtime.image_inputs.control import MID_RESIDUAL, residual_names

TIME_IDS = 6  # original size, crop corner, target size
GUIDANCE_WIDTH = 256  # as in published latent consistency models
CLIP_LENGTH = 77  # if the denoiser is loaded without its text encoder
SDXL, LCM = "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"
INPAINT, SDXL_INPAINT = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"
# steps, guidance
DEFAULTS = {"StableDiffusionPipeline": (50, 7.5), SDXL: (50, 5.0), LCM: (4, 8.5)}
DEFAULTS |= {INPAINT: (50, 7.5), SDXL_INPAINT: (50, 7.5)}
TASKS = {
    5: "generation from a depth map",
    7: "upscaling",
    8: "editing an image by an instruction, or for variations of one",
    9: "inpainting",
}


def describe(layout: Layout) -> Description:
    """Read sample shape, conditioning and defaults from the pipeline's configs.

    Raises:
        InvalidInputError: The network needs an input that its pipeline does not pass.
    """
    config = layout.config
    _check_inputs(layout)
    shape = square(config["out_channels"], sample_size(layout))
    inpainting = "mask" if config["in_channels"] != config["out_channels"] else ""
    multiple = 2 ** (len(config["block_out_channels"]) - 1)
    encoders = [text_encoder(layout, name) for name, _ in layout.encoders]
    length, width = encoders[0].length if encoders else CLIP_LENGTH, _context_width(config)
    guided = config["time_cond_proj_dim"] is not None
    defaults = DEFAULTS[layout.pipeline]
    if layout.pipeline not in (SDXL, SDXL_INPAINT):
        inputs = {"encoder_hidden_states": TextInput((length, width), (("text_encoder.last_hidden_state",),))}
        return Description(
            shape, text(layout, encoders, inputs, guidance_input=guided, inpainting=inpainting), multiple, *defaults
        )
    pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
    hidden = tuple(penultimate(layout, encoder.graph) for encoder in encoders)
    inputs = {
        "encoder_hidden_states": TextInput((length, width), (hidden,)),
        "text_embeds": TextInput((pooled,), (("text_encoder_2.text_embeds",),)),
        "time_ids": TextInput((TIME_IDS,), (("size", "corner", "size"),)),
    }
    zero = bool(layout.index["force_zeros_for_empty_prompt"])
    conditioning = text(layout, encoders, inputs, zero_negative=zero, guidance_input=guided, inpainting=inpainting)
    return Description(shape, conditioning, multiple, *defaults)


def _check_inputs(layout: Layout) -> None:
    """Check that the pipeline passes every input that the network needs."""
    config, pipeline = layout.config, layout.pipeline
    if pipeline not in (INPAINT, SDXL_INPAINT) or config["in_channels"] != 2 * config["out_channels"] + 1:
        check_task(layout, config["in_channels"], config["out_channels"], TASKS)
    for entry in ("class_embed_type", "num_class_embeds"):
        check_entry(layout, entry, (None,), "which passes no class labels")
    check_entry(layout, "encoder_hid_dim_type", (None, "text_proj"), "which passes no image embedding")
    added = ("text_time",) if pipeline in (SDXL, SDXL_INPAINT) else (None, "text")
    check_entry(layout, "addition_embed_type", added, "which passes no other embedding")
    if pipeline == LCM and config["time_cond_proj_dim"] is None:
        check_entry(layout, "time_cond_proj_dim", ("a number",), "which passes the guidance weight")


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate the network; guidance inputs w are embedded as w - 1 (latent consistency models).

    Residuals of a ControlNet, if there are any, are added to the skip connections and to the output of the middle.
    """
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    embedding = None
    if "guidance" in inputs:
        config = getattr(model, "module", model).config  # under DDP the model is wrapped
        embedding = guidance_embedding(inputs["guidance"] - 1.0, config.time_cond_proj_dim)
    sample = inputs["sample"]
    if MASKED_IMAGE in inputs:
        sample = torch.cat([sample, inputs[MASKED_IMAGE]], dim=1)
    skips = [inputs[name] for name in residual_names(len(inputs))[:-1] if name in inputs]
    out: torch.Tensor = model(
        sample,
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        timestep_cond=embedding,
        added_cond_kwargs=added or None,
        down_block_additional_residuals=skips or None,
        mid_block_additional_residual=inputs.get(MID_RESIDUAL),
        return_dict=False,
    )[0]
    return out


def add_guidance_input_(model: Any) -> dict[str, Any]:
    """Add a zero-initialized guidance projection to the time embedding; returns the changed config entries."""
    first = model.time_embedding.linear_1
    layer = nn.Linear(GUIDANCE_WIDTH, first.in_features, bias=False).to(first.weight)
    nn.init.zeros_(layer.weight)
    model.time_embedding.cond_proj = layer
    model.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)
    return {"time_cond_proj_dim": GUIDANCE_WIDTH}


def guidance_embedding(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Return the sinusoidal embedding of 1000 w, [B, width] (Luo et al. 2023, section 4.1)."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=weight.device, dtype=weight.dtype) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * weight[:, None] * rates
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))  # as diffusers does


def sensitive_layers(model: nn.Module) -> list[str]:
    """Return the first and last convolution and the embedding and time-projection layers."""
    ends = ("conv_in", "conv_out", "time_emb_proj")
    starts = ("time_embedding.", "add_embedding.")
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return [name for name in layers if name.endswith(ends) or name.startswith(starts)]


def _context_width(config: dict[str, Any]) -> int:
    # a network that projects the text states reads them in the width of its projection
    width = config["encoder_hid_dim"] if config["encoder_hid_dim_type"] else config["cross_attention_dim"]
    return int(width if isinstance(width, int) else width[0])


ADAPTER = Adapter(
    describe=describe,
    forward=forward,
    resizable=True,
    blocks=unet2d.blocks,
    sensitive_layers=sensitive_layers,
    residual_outputs=diffusers_blocks.residual_outputs,
    attentions=diffusers_blocks.attentions,
    coupled=diffusers_blocks.coupled,
    removable_blocks=removable_blocks.unet_blocks,
    refresh_=unet2d.refresh_,
    cache_cuts=unet2d.cache_cuts,
    add_guidance_input_=add_guidance_input_,
)
