"""The blocks that published small U-Nets lack, by name of a preset (BK-SDM, Kim et al. 2023, arXiv:2305.15798, fig. 3).

    bk_sdm_base     of each stage the second pair of residual block and attention, on both sides
    bk_sdm_small    also the middle block
    bk_sdm_tiny     also the innermost stages, with the resampling between them and their neighbours

They fit U-Nets like Stable Diffusion 1 and 2: four stages, two pairs on the way down and three on the way up. The
second of the three reads the skip connection of the second of the two.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from diffpress.compress.models.removable_blocks import unet_blocks
from diffpress.compress.models.removed_blocks import Removable, RemovedBlock
from diffpress.compress.pruning.config import Preset
from diffpress.runtime.errors import InvalidInputError

STAGES, DOWN_PAIRS, UP_PAIRS = 4, 2, 3
SECOND = ("resnets.1", "attentions.1")


def preset_blocks(model: nn.Module, preset: Preset) -> list[Removable]:
    """Return the blocks of a preset.

    Raises:
        InvalidInputError: The network is not built like Stable Diffusion's.
    """
    if not _is_like_stable_diffusion(model):
        raise InvalidInputError(
            f"prune: preset {preset} fits U-Nets like Stable Diffusion 1 and 2 ({STAGES} stages, {DOWN_PAIRS} residual "
            f"blocks per stage), not this {type(model).__name__}; use remove, blocks or target"
        )
    removable = {block.name: block for block in unet_blocks(model)}
    stages = [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(STAGES)]
    chosen = [f"{stage}.{member}" for stage in stages for member in SECOND]
    if preset in ("bk_sdm_small", "bk_sdm_tiny"):
        chosen += [name for name in removable if name.startswith("mid_block.")]
    resamplers: list[str] = []
    if preset == "bk_sdm_tiny":
        chosen += [name for name in removable if name.startswith((f"down_blocks.{STAGES - 1}.", "up_blocks.0."))]
        resamplers = [f"down_blocks.{STAGES - 2}.downsamplers.0", "up_blocks.0.upsamplers.0"]
    present = dict(model.named_modules())
    chosen = [name for name in dict.fromkeys(chosen) if name in present]  # not all stages have attentions
    missing = next((name for name in (*chosen, *resamplers) if isinstance(present[name], RemovedBlock)), None)
    if missing is not None:
        raise InvalidInputError(f"prune: preset {preset}: {missing} was removed before; prune the original network")
    blocks = [removable[name] for name in chosen]
    return blocks + [Removable(name, "first") for name in resamplers]


def _is_like_stable_diffusion(model: Any) -> bool:
    sides = [getattr(model, f"{side}_blocks", ()) for side in ("down", "up")]
    counts = [[len(getattr(stage, "resnets", ())) for stage in side] for side in sides]
    innermost = counts == [[DOWN_PAIRS] * STAGES, [UP_PAIRS] * STAGES]
    return innermost and hasattr(getattr(model, "mid_block", None), "attentions")
