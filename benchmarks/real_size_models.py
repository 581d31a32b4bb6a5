"""Networks of real size: configs, and the plan that each is quantized and sampled under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """A network and the plan it is sampled under.

    Attributes:
        kind: diffusers class.
        component: Its folder in a pipeline.
        last: Name of its last layer.
        dtype: Type of the stored weights.
        steps: Steps of the plan (dpmpp_2m).
        guidance: Guidance weight of the plan.
        config: Config of the full scale.
        small: Entries that the small scale changes.
        sides: Sides of the latents that the last layer is fitted on, besides the network's own.
    """

    kind: str
    component: str
    last: str
    dtype: str
    steps: int
    guidance: float
    config: dict[str, Any]
    small: dict[str, Any]
    sides: tuple[int, ...] = ()


SMALL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
SD15 = Model(
    kind="UNet2DConditionModel",
    component="unet",
    last="conv_out",
    dtype="float32",
    steps=8,
    guidance=7.5,
    config={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    small={
        **SMALL_UNET,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    sides=(16,),  # parity is checked on 16 x 16
)
SDXL = Model(
    kind="UNet2DConditionModel",
    component="unet",
    last="conv_out",
    dtype="bfloat16",
    steps=4,
    guidance=7.5,
    config={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    small={
        **SMALL_UNET,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
    sides=(16,),
)
DIT_XL = Model(
    kind="DiTTransformer2DModel",
    component="transformer",
    last="proj_out_2",
    dtype="bfloat16",
    steps=8,
    guidance=4.0,
    config={
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 8,  # v and the learned variance, which is not fitted
        "patch_size": 2,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_embeds_ada_norm": 1000,
    },
    small={
        "sample_size": 16,
        "num_layers": 4,
        "num_attention_heads": 8,
        "attention_head_dim": 24,
        "num_embeds_ada_norm": 10,
    },
)
MODELS = {"sd15": SD15, "sdxl": SDXL, "dit_xl": DIT_XL}
