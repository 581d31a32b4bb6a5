"""Settings of the `prune` stage: the keys of `prune: {...}` in a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffpress.compress.config import StageConfig


class PruneConfig(StageConfig):
    """Remove channels and attention heads by importance.

    Examples:
        >>> import diffpress as dp
        >>> dp.Prune(ratio=0.3).method
        'taylor'
    """

    method: Literal["taylor", "magnitude", "random"] = Field("taylor", description="Importance criterion of a channel.")
    ratio: float = Field(0.3, gt=0.0, lt=1.0, description="Fraction of channels and attention heads removed.")
    scope: Literal["local", "global"] = Field(
        "local", description="local prunes every layer group by ratio; global distributes it over the network."
    )
    round_to: int = Field(8, ge=1, description="Kept widths are multiples of this many channels.")
    batch: int = Field(32, ge=1, description="Images per batch for the gradients of method taylor.")
    timesteps: int = Field(24, ge=1, description="Number of timesteps at which method taylor computes gradients.")
    threshold: float = Field(
        0.05,
        ge=0.0,
        le=1.0,
        description="Method taylor stops at a loss below this fraction of the largest loss so far.",
    )
