"""Tiny diffusers pipelines with random weights, built offline: the reference for every model family.

    tiny_pipeline('sd', folder)               write a pipeline folder with save_pretrained, a few hundred KiB
    sampled(pipe, noise(pipe, 2), ...)        images [N, 3, H, W] in [0, 1], sampled by diffusers

The scheduler and everything else that determines sampling (prediction type, scaling, unconditional inputs, tokens) are
those of the published checkpoint that the kind is named after; only widths, depths and sizes are small.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from sentencepiece import sentencepiece_model_pb2
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_TOKENS = 16  # 77 in published checkpoints
T5_TOKENS = 24
CLASSES = 1000  # DiTPipeline hard-codes its null label, 1000
WORDS = ("cat", "dog", "photo", "red", "of", "a")
SPIECE = "\u2581"

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_pipeline(kind: str | Callable[[], Any], folder: Path, seed: int = 0, tokenizer_json: bool = True) -> Path:
    """Write a tiny pipeline of this kind to `folder`, safetensors only; the same seed gives the same weights.

    `kind` is one of KINDS, or a function that builds a pipeline.

    Without `tokenizer_json` the tokenizers are stored only in the older formats, as in most published folders:
    vocab.json and merges.txt for CLIP, spiece.model for T5.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = KINDS[kind]() if isinstance(kind, str) else kind()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                fill_zeros_(component)
    pipe.save_pretrained(folder, safe_serialization=True)
    for name, component in pipe.components.items():
        if isinstance(component, CLIPTokenizer):
            component.backend_tokenizer.model.save(str(folder / name))
        elif isinstance(component, T5Tokenizer):
            (folder / name / "spiece.model").write_bytes(_sentencepiece(component))
        if isinstance(component, CLIPTokenizer | T5Tokenizer) and not tokenizer_json:
            (folder / name / "tokenizer.json").unlink()
    if isinstance(pipe, DiTPipeline):  # save_pretrained drops the class names; the published folder has them
        index = json.loads((folder / "model_index.json").read_text())
        names = {str(label): f"thing {label}, object {label}" for label in range(CLASSES)}
        (folder / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
    return folder


def noise(pipe: Any, count: int, seed: int = 0) -> torch.Tensor:
    """Draw standard normal latents [count, C, 8, 8], the size of these pipelines."""
    model = getattr(pipe, "transformer", None) or pipe.unet
    channels = model.config.in_channels // (4 if isinstance(pipe, FluxPipeline) else 1)
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def sampled(
    pipe: Any,
    latents: torch.Tensor,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    steps: int = 2,
    **options: Any,
) -> torch.Tensor:
    """Sample images [N, 3, H, W] in [0, 1] from standard normal `latents` [N, C, h, w] with the pipeline's own loop.

    Args:
        pipe: A pipeline of one of KINDS.
        latents: Initial noise.
        prompts: One prompt per sample, for text-conditional pipelines.
        labels: One label per sample, for class-conditional pipelines.
        steps: Number of steps.
        **options: Passed to the pipeline's call: guidance_scale; a generator for LCM, which adds noise between steps.
    """
    kind = type(pipe)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, **options}
    if issubclass(kind, DiTPipeline | LDMPipeline | DDIMPipeline):
        count = {"class_labels": list(labels)} if issubclass(kind, DiTPipeline) else {"batch_size": len(latents)}
        with _patched_noise(pipe, latents):
            images = pipe(**count, **options, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
    if issubclass(kind, PixArtAlphaPipeline | PixArtSigmaPipeline):
        options = {"use_resolution_binning": False, "clean_caption": False, **options}
    if issubclass(kind, StableDiffusion3Pipeline | FluxPipeline | PixArtAlphaPipeline | PixArtSigmaPipeline):
        options = {"max_sequence_length": T5_TOKENS, **options}
    if issubclass(kind, FluxPipeline):
        latents = pipe._pack_latents(latents, *latents.shape)
    options = {"height": height, "width": width, "latents": latents.clone(), "output_type": "pt", **options}
    return pipe(prompt=list(prompts), **options).images


@contextlib.contextmanager
def _patched_noise(pipe: object, latents: torch.Tensor) -> Iterator[None]:
    """Replace the noise that the pipeline draws, for pipelines without a `latents` argument."""
    with mock.patch.object(
        sys.modules[type(pipe).__module__], "randn_tensor", side_effect=lambda *_, **__: latents.clone()
    ):
        yield


def fill_zeros_(model: nn.Module) -> None:
    """Give parameters initialized to zero (adaLN-zero, output layers, biases) small random values."""
    for name, parameter in model.named_parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith("quantize.embedding.weight"):
            nn.init.normal_(parameter)  # initialized within 1 / codes of zero, where all unit latents share a code


# --- autoencoders ----------------------------------------------------------------------------------------------


VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}


def vae(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(**VAE, latent_channels=latent_channels, **config)


def tiny_vae(latent_channels: int = 4, **config: Any) -> AutoencoderTiny:
    """Build an autoencoder of TAESD's class: 2 pixels per cell, and its own scale of latents."""
    widths = {f"{half}_block_out_channels": (16, 16) for half in ("encoder", "decoder")}
    blocks = {f"num_{half}_blocks": (1, 1) for half in ("encoder", "decoder")}
    return AutoencoderTiny(**{**widths, **blocks, **config}, latent_channels=latent_channels)


def vq() -> VQModel:
    return VQModel(
        block_out_channels=(16, 32),
        down_block_types=VAE["down_block_types"],
        up_block_types=VAE["up_block_types"],
        norm_num_groups=8,
        sample_size=16,
        num_vq_embeddings=64,
        latent_channels=3,
    )


# --- text ------------------------------------------------------------------------------------------------------


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Build a byte-level BPE tokenizer: every byte, every byte ending a word, and the merges of WORDS."""
    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[Any] = []
    for word in WORDS:
        left = word[0]
        for index, letter in enumerate(word[1:], 1):
            right = letter + ("</w>" if index == len(word) - 1 else "")
            if left + right not in names:
                names.append(left + right)
                merges.append((left, right))
            left += right
    names += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        {name: index for index, name in enumerate(names)}, merges, pad_token=pad, model_max_length=CLIP_TOKENS
    )


def t5_tokenizer() -> T5Tokenizer:
    """Build a unigram tokenizer over letters and WORDS, without sentinel tokens."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?-'"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPIECE, -2.0)]
    pieces += [(SPIECE + word, -3.0) for word in WORDS] + [(letter, -5.0) for letter in letters]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=T5_TOKENS)


def _sentencepiece(tokenizer: T5Tokenizer) -> bytes:
    """Serialize the unigram model in sentencepiece's format."""
    proto: Any = sentencepiece_model_pb2
    kinds = {"<pad>": proto.ModelProto.SentencePiece.CONTROL, "</s>": proto.ModelProto.SentencePiece.CONTROL}
    kinds["<unk>"] = proto.ModelProto.SentencePiece.UNKNOWN
    spec = proto.TrainerSpec(model_type=proto.TrainerSpec.UNIGRAM, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    model = proto.ModelProto(trainer_spec=spec)
    for piece, score in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, proto.ModelProto.SentencePiece.NORMAL))
    return model.SerializeToString()


def clip_encoder(tokenizer: CLIPTokenizer, kind: type = CLIPTextModel, width: int = 32, **config: Any) -> Any:
    # eos_token_id is 2 as in published configs; transformers then uses the highest token, which is the end token
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CLIP_TOKENS,
        "projection_dim": width,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "hidden_act": "quick_gelu",
    }
    return kind(CLIPTextConfig(**{**settings, **config})).eval()


def t5_encoder(tokenizer: T5Tokenizer, width: int = 32) -> T5EncoderModel:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }
    return T5EncoderModel(T5Config(**settings)).eval()


# --- denoisers -------------------------------------------------------------------------------------------------


def unet(cross_attention_dim: int = 32, **config: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**settings, **config}, cross_attention_dim=cross_attention_dim)


def pixart(**config: Any) -> PixArtTransformer2DModel:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,  # heads * dim must be a multiple of 3 for the size conditioning
        "cross_attention_dim": 48,
        "caption_channels": 24,
        "num_layers": 2,
        "sample_size": 8,
    }
    return PixArtTransformer2DModel(**{**settings, **config})


# --- pipelines -------------------------------------------------------------------------------------------------


def _ldm(first_stage: Any) -> LDMPipeline:
    channels = first_stage.config.latent_channels
    model = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    return LDMPipeline(vqvae=first_stage, unet=model, scheduler=scheduler)


def _stable_diffusion(model: UNet2DConditionModel, pad: str = "<|endoftext|>", **schedule: Any) -> Any:
    tokenizer = clip_tokenizer(pad)
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **schedule)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=model,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd() -> StableDiffusionPipeline:
    return _stable_diffusion(unet())


def _sd2_v() -> StableDiffusionPipeline:
    model = unet(attention_head_dim=[2, 4], use_linear_projection=True)
    return _stable_diffusion(model, pad="!", prediction_type="v_prediction")


def sd_inpaint() -> StableDiffusionInpaintPipeline:
    """Build Stable Diffusion with a U-Net of 9 channels, which reads the mask and the masked image."""
    parts = {**_stable_diffusion(unet(in_channels=9, out_channels=4)).components, "requires_safety_checker": False}
    return StableDiffusionInpaintPipeline(**parts)


def sdxl_inpaint() -> StableDiffusionXLInpaintPipeline:
    """Build SDXL with a U-Net of 9 channels."""
    pipe: Any = _sdxl(in_channels=9, out_channels=4)
    return StableDiffusionXLInpaintPipeline(**pipe.components)


def flux_fill() -> FluxFillPipeline:
    """Build FLUX.1 Fill: tokens of 4 x 16 latents, and of the masked image 4 x 16 and a mask of 4 x 2 x 2."""
    pipe: Any = _flux(True, 4 * (16 + 16 + 4), shift=3.0, use_dynamic_shifting=True)
    parts = pipe.components
    return FluxFillPipeline(
        **{name: parts[name] for name in parts if name not in ("image_encoder", "feature_extractor")}
    )


def _sdxl(**config: Any) -> StableDiffusionXLPipeline:
    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    model = unet(
        cross_attention_dim=32 + 48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
        **config,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip_encoder(first),
        text_encoder_2=clip_encoder(
            second, CLIPTextModelWithProjection, width=48, projection_dim=40, hidden_act="gelu"
        ),
        tokenizer=first,
        tokenizer_2=second,
        unet=model,
        scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
    )


def _lcm() -> LatentConsistencyModelPipeline:
    tokenizer = clip_tokenizer()
    return LatentConsistencyModelPipeline(
        vae=vae(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet(time_cond_proj_dim=32),
        scheduler=LCMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _dit() -> DiTPipeline:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=CLASSES,
        norm_elementwise_affine=False,
    )
    scheduler = DDIMScheduler(clip_sample=False)
    return DiTPipeline(transformer=model, vae=vae(), scheduler=scheduler)


def _pixart(pipeline: type, model: PixArtTransformer2DModel, first_stage: AutoencoderKL) -> Any:
    tokenizer = t5_tokenizer()
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer, width=24),
        vae=first_stage,
        transformer=model,
        scheduler=DPMSolverMultistepScheduler(),
    )


def _sd3(**transformer: Any) -> StableDiffusion3Pipeline:
    first, second, third = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=24 + 40,
        pos_embed_max_size=12,
        **transformer,
    )
    projecting = CLIPTextModelWithProjection
    return StableDiffusion3Pipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(first, projecting, width=24, projection_dim=24),
        tokenizer=first,
        text_encoder_2=clip_encoder(second, projecting, width=32, projection_dim=40, hidden_act="gelu"),
        tokenizer_2=second,
        text_encoder_3=t5_encoder(third, width=64),
        tokenizer_3=third,
    )


def _flux(guided: bool, channels: int = 4 * 16, **schedule: Any) -> FluxPipeline:
    first, second = clip_tokenizer(), t5_tokenizer()
    model = FluxTransformer2DModel(
        in_channels=channels,
        out_channels=4 * 16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guided,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(first, width=24),
        tokenizer=first,
        text_encoder_2=t5_encoder(second),
        tokenizer_2=second,
        transformer=model,
    )


KINDS: dict[str, Callable[[], Any]] = {
    "ldm": lambda: _ldm(vq()),
    "ldm-kl": lambda: _ldm(vae()),
    "sd": _sd,
    "sd2-v": _sd2_v,
    "sdxl": _sdxl,
    "lcm": _lcm,
    "dit": _dit,
    "pixart-alpha": lambda: _pixart(PixArtAlphaPipeline, pixart(), vae()),
    # conditioned on resolution and aspect ratio, which the pipeline passes if sample_size is 128
    "pixart-alpha-1024": lambda: _pixart(PixArtAlphaPipeline, pixart(sample_size=128), vae()),
    "pixart-sigma": lambda: _pixart(
        PixArtSigmaPipeline,
        pixart(sample_size=128, use_additional_conditions=False, interpolation_scale=2),
        vae(scaling_factor=0.13025),
    ),
    "sd3": _sd3,
    "sd3.5": lambda: _sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux": lambda: _flux(guided=True, shift=3.0, use_dynamic_shifting=True),
    "flux-schnell": lambda: _flux(guided=False, shift=1.0),
}
