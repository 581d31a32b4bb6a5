"""The factor alpha / rank of a LoRA's layers, where it is stored beside the tensors instead of as `.alpha`.

    adapter_config.json                 PEFT, in the folder of adapter_model.safetensors
    metadata 'lora_adapter_metadata'    diffusers, in the file itself: {"unet.r": 4, "unet.lora_alpha": 8, ...}

PEFT's `alpha_pattern` overrides alpha by the end of a layer's name; with `use_rslora` the factor is alpha / sqrt(rank).
Settings with which the tensors mean something else are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json

METADATA = "lora_adapter_metadata"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base weights
DENOISER = "denoiser"

Configs = dict[str, dict[str, Any]]  # graph -> settings of PEFT's LoraConfig


def read_configs(file: Path, metadata: Mapping[str, str], component: str) -> Configs:
    """Return PEFT's settings for each graph, where they are stored; `component` is the denoiser's folder.

    Raises:
        InvalidInputError: They are damaged, or not supported; the message names the setting.
    """
    if METADATA in metadata:
        try:
            flat = json.loads(metadata[METADATA])
        except (ValueError, TypeError, RecursionError):
            flat = None
        if not isinstance(flat, dict):
            raise InvalidInputError(f"{file}: its metadata '{METADATA}' is no JSON object; save it again")
        configs: Configs = {}
        for key, value in flat.items():
            folder, _, name = key.partition(".")
            configs.setdefault(DENOISER if folder == component else folder, {})[name] = value
    elif file.name == PEFT_FILE and (file.parent / PEFT_CONFIG).is_file():
        configs = {DENOISER: read_json(file.parent / PEFT_CONFIG, hint="copy it again")}
    else:
        return {}
    for config in configs.values():
        _check(file, config)
    return configs


def factor(file: Path, config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the factor of a layer of this rank under PEFT's settings; 1 without them."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if f".{layer}".endswith(f".{pattern}"):
            alpha = value
            break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InvalidInputError(f"{file}: lora_alpha = {alpha!r} of layer '{layer}' is not a finite number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check(file: Path, config: Mapping[str, Any]) -> None:
    unsupported = {
        "use_dora": bool(config.get("use_dora")),
        "lora_bias": bool(config.get("lora_bias")),
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "peft_type": str(config.get("peft_type", "LORA")).upper() not in ("LORA", "PEFTTYPE.LORA"),
        "init_lora_weights": config.get("init_lora_weights") not in PLAIN_INITIALIZATIONS,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise InvalidInputError(
                f"{file}: its setting {name} = {config[name]!r} is not supported in slots; fuse it before the export"
            )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", str(key)) for key in patterns):
        raise InvalidInputError(
            f"{file}: its alpha_pattern is not a map from names of layers; fuse it before the export"
        )
