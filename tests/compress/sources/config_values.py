"""Other values for a config entry, derived from its present one: flipped, moved, or another name that classes check."""

from __future__ import annotations

from typing import Any

SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "TCDScheduler",
    "DDIMInverseScheduler",
]
ACTIVATIONS = ["silu", "relu", "gelu", "mish"]
NAMES: dict[str, list[Any]] = {
    "_class_name": SCHEDULERS,
    "act_fn": ACTIVATIONS,
    "activation_fn": ["geglu", "gelu", "gelu-approximate"],
    "addition_embed_type": ["text", "text_time", "image", "text_image", "image_hint"],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"],
    "attention_type": ["default", "gated"],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
    "class_embed_type": ["timestep", "identity", "projection", "simple_projection"],
    "cross_attention_norm": ["layer_norm", "group_norm"],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"],
    "downsample_type": ["conv", "resnet"],
    "encoder_hid_dim_type": ["text_proj", "text_image_proj", "image_proj", "ip_image_proj"],
    "feed_forward_proj": ["relu", "gelu", "gated-gelu", "gated-silu"],
    "final_sigmas_type": ["zero", "sigma_min"],
    "hidden_act": ["quick_gelu", "gelu", "relu", "silu"],
    "interpolation_type": ["linear", "log_linear"],
    "mid_block_type": ["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"],
    "norm_type": ["layer_norm", "ada_norm", "ada_norm_zero", "ada_norm_single", "spatial", "group"],
    "pad_token": ["!", "<|startoftext|>", "</s>"],
    "padding_side": ["right", "left"],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "qk_norm": ["rms_norm", "layer_norm"],
    "resnet_time_scale_shift": ["default", "scale_shift"],
    "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho"],
    "time_embedding_act_fn": ACTIVATIONS,
    "time_embedding_type": ["positional", "fourier", "learned"],
    "time_shift_type": ["exponential", "linear"],
    "timestep_post_act": ACTIVATIONS,
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "timestep_type": ["discrete", "continuous"],
    "truncation_side": ["right", "left"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "upsample_type": ["conv", "resnet"],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
}
# numbers for entries that are None by default; others get OPTIONAL
NUMBERS: dict[str, list[Any]] = {
    "encoder_hid_dim": [32],
    "latents_mean": [[0.1, -0.2, 0.3, 0.05], [0.1] * 4, [0.1] * 16],
    "latents_std": [[0.9, 1.1, 1.2, 0.8], [1.2] * 4, [1.2] * 16],
    "num_class_embeds": [10],
    "projection_class_embeddings_input_dim": [16],
    "shift_factor": [0.1],
    "shift_terminal": [0.02],
    "sigma_max": [10.0],
    "sigma_min": [0.03],
    "time_cond_proj_dim": [32],
    "trained_betas": [[0.001 + 0.0001 * i for i in range(100)]],
    "timesteps": [],
}
OPTIONAL = [True, 1, 2, 8, 0.5]
SIZES = ("sample_size",)


def values_for(entry: str, value: Any) -> list[Any]:
    """Return other values for an entry, without its present one."""
    return [other for other in _values(entry, value) if other != value or type(other) is not type(value)]


def _values(entry: str, value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return _lists(entry, list(value))
    if entry in NAMES:
        return [*NAMES[entry], None]
    if value is None:
        return NUMBERS.get(entry, OPTIONAL)
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [4, 12, 16] if entry in SIZES else [value + 1, value - 1, 2 * value, value // 2]
    if isinstance(value, float):
        return [0.0, 0.5, 1.0, 0.9 * value, 1.25 * value]
    return []


def _lists(entry: str, value: list[Any]) -> list[Any]:
    """Return lists with one other element, and lists of which all elements move together."""
    found = []
    for index, element in enumerate(value):
        found += [[*value[:index], other, *value[index + 1 :]] for other in values_for(entry, element)]
    if value and all(isinstance(element, int) and not isinstance(element, bool) for element in value):
        found += [[2 * element for element in value], value[:1] * len(value)]
    return found
