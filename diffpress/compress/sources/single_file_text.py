"""Text encoders inside a single-file checkpoint: which tensors diffusers reads into them.

    cond_stage_model.transformer.text_model...             CLIP with the names of transformers
    cond_stage_model.model.transformer.resblocks...        CLIP with the names of OpenCLIP
    conditioner.embedders.{0,1}...                         the same, of SDXL
    text_encoders.{clip_l,clip_g,t5xxl}.transformer...     CLIP and T5 with the names of transformers

diffusers converts tensor by tensor and drops what the encoder does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from diffpress.compress.sources.pretrained import EXTRA

CLIP = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")  # besides those that diffusers knows
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.", "conditioner.embedders.1.model.")
# start of a tensor's name, before the name that the encoder has for it
PREFIX = re.compile(r"^(cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.((transformer|model)\.)?")
# what OpenCLIP stores besides the text encoder
OPEN_CLIP_EXTRA = re.compile(r"^(visual|attn_mask)\b")


def has_text_encoder(tensors: Mapping[str, torch.Tensor], kind: str) -> bool:
    """Whether diffusers reads text encoders of the class `kind` from a file with these tensors."""
    import transformers
    from diffusers.loaders.single_file_utils import is_clip_model_in_single_file, is_t5_in_single_file

    return bool(is_clip_model_in_single_file(getattr(transformers, kind), tensors) or is_t5_in_single_file(tensors))


def unread_text_tensors(tensors: Mapping[str, torch.Tensor], encoders: Iterable[Any]) -> tuple[list[str], list[str]]:
    """Return the names of the tensors that no text encoder reads, except those of a complete CLIP or T5.

    Args:
        tensors: Tensors of the file; they may be on the meta device.
        encoders: Text encoders of the pipeline, None for those that it does not have.

    Returns:
        Those that lie beside tensors that are read, and the others, which are of no text encoder of the pipeline.
    """
    from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE

    models = [model for model in encoders if model is not None]
    shapes = [{_plain(key): value.shape for key, value in model.state_dict().items()} for model in models]
    extras = (OPEN_CLIP_EXTRA, *(EXTRA[kind] for kind in {type(model).__name__ for model in models} & EXTRA.keys()))
    unread, used = [], set()
    for name, tensor in tensors.items():
        prefix = PREFIX.match(name)
        if prefix is None:
            unread.append(name)
        elif any(_is_read(name, tensor, *pair) for pair in zip(models, shapes, strict=True)):
            used.add(prefix[1])
        elif name not in SD_2_TEXT_ENCODER_KEYS_TO_IGNORE and not any(
            pattern.search(name[prefix.end() :]) for pattern in extras
        ):
            unread.append(name)
    beside = [name for name in unread if (prefix := PREFIX.match(name)) and prefix[1] in used]
    return beside, [name for name in unread if name not in beside]


def _is_read(name: str, tensor: torch.Tensor, model: Any, expected: dict[str, torch.Size]) -> bool:
    for found in _conversions(name, tensor, model):
        if found and {_plain(key): value.shape for key, value in found.items()}.items() <= expected.items():
            return True
    return False


def _conversions(name: str, tensor: torch.Tensor, model: Any) -> Iterable[dict[str, torch.Tensor]]:
    """Yield what each converter of diffusers makes of one tensor."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_open_clip_checkpoint,
        convert_sd3_t5_checkpoint_to_diffusers,
    )

    state = {name: tensor}
    for prefix in CLIP:
        yield convert_ldm_clip_checkpoint(state, prefix)
    for prefix in OPEN_CLIP:
        yield convert_open_clip_checkpoint(model, state, prefix)
    yield convert_sd3_t5_checkpoint_to_diffusers(state)


def _plain(name: str) -> str:
    """Return a tensor's name without the prefix that some versions of transformers have."""
    return name.removeprefix("text_model.")
