"""Settings of the `prune` stage: the keys of `prune: {...}` in a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from diffpress.compress.config import Config, StageConfig

Method = Literal["taylor", "diff_pruning", "magnitude", "random"]
Engine = Literal["openvino", "onnxruntime"]  # in order of preference
Preset = Literal["bk_sdm_base", "bk_sdm_small", "bk_sdm_tiny"]
DEFAULT_RATIO = 0.3
DEFAULT_ENGINE = "openvino"
QUANTITIES = {"macs": "MACs", "params": "parameters", "latency": "latency of a step"}


class PruneTarget(Config):
    """What remains of the network, as a fraction of what it was before the stage."""

    macs: float | None = Field(None, gt=0.0, lt=1.0, description="Fraction of the MACs that remains.")
    params: float | None = Field(None, gt=0.0, lt=1.0, description="Fraction of the parameters that remains.")
    latency: float | None = Field(
        None, gt=0.0, lt=1.0, description="Fraction of the latency of a step that remains, measured in `engine`."
    )
    engine: Engine | None = Field(None, description="Engine in which latency is measured; None means OpenVINO.")

    @property
    def name(self) -> str:
        """The key that is set."""
        return next(name for name in QUANTITIES if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """The fraction that remains."""
        return float(getattr(self, self.name))

    @property
    def quantity(self) -> str:
        """What the fraction is of, in words."""
        return QUANTITIES[self.name]

    @model_validator(mode="after")
    def _names_one(self) -> PruneTarget:
        if sum(getattr(self, name) is not None for name in QUANTITIES) != 1:
            raise ValueError(
                f"a target is one of {', '.join(QUANTITIES)}: the fraction that remains, such as {{macs: 0.56}}"
            )
        if self.engine is not None and self.latency is None:
            raise ValueError("engine belongs to a target of latency; set latency, or remove engine")
        return self


class PruneConfig(StageConfig):
    """Remove channels and attention heads by importance.

    Examples:
        >>> import diffpress as dp
        >>> dp.Prune(ratio=0.3).method
        'taylor'
        >>> dp.Prune(target={"macs": 0.56}).target.fraction
        0.56
    """

    kind: Literal["width"] = Field("width", description="Kind of pruning.")
    method: Method = Field("taylor", description="Importance criterion of a channel.")
    ratio: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description=f"Fraction of channels and attention heads removed; {DEFAULT_RATIO} if there is no target.",
    )
    target: PruneTarget | None = Field(None, description="What remains of the network, in place of a ratio.")
    scope: Literal["local", "global"] = Field(
        "local", description="local prunes every layer group by ratio; global distributes it over the network."
    )
    residual: bool | None = Field(
        None,
        description="Whether the width of the residual stream shrinks, not only the inner widths of its branches; None "
        "means true for UNet2DModel and custom modules, and false for other families.",
    )
    round_to: int = Field(8, ge=1, description="Kept widths are multiples of this many channels.")
    batch: int = Field(32, ge=1, description="Images per batch for the gradients of taylor and diff_pruning.")
    timesteps: int = Field(
        24, ge=1, description="Number of timesteps at which taylor and diff_pruning compute gradients."
    )
    threshold: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="Method diff_pruning stops at a loss below this fraction of the largest loss so far; None means "
        "0.05.",
    )

    @model_validator(mode="before")
    @classmethod
    def _ratio_or_target(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or settings.get("target") is not None or settings.get("ratio") is not None:
            return settings
        return settings | {"ratio": DEFAULT_RATIO}

    @model_validator(mode="after")
    def _agrees(self) -> PruneConfig:
        if self.ratio is not None and self.target is not None:
            raise ValueError(
                "ratio and target exclude each other: ratio is the fraction of channels removed, target "
                "what remains of the network; remove one"
            )
        if self.threshold is not None and self.method != "diff_pruning":
            raise ValueError(
                f"threshold belongs to method diff_pruning, not {self.method}; set it, or remove threshold"
            )
        return self


class RecoverabilityConfig(Config):
    """Search for the blocks without which the network recovers best (pruning/recoverability.py)."""

    steps: int = Field(300, ge=3, description="Training steps; the blocks are learned in the last two thirds.")
    batch: int = Field(8, ge=1, description="Samples per step in each process; four networks are trained on each.")
    learning_rate: float = Field(1e-3, gt=0.0, description="Peak learning rate of the low-rank updates.")
    rank: int = Field(8, ge=1, description="Rank of the updates that simulate the later training.")
    samples: int = Field(
        256, ge=1, description="Number of teacher samples to train on if the recipe has no data; generated once."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Compute precision; bf16 runs under autocast, the updates stay float32."
    )
    save_every: int = Field(50, ge=1, description="Steps between two saves of the training state, for resuming.")


class PruneDepthConfig(StageConfig):
    """Remove whole blocks: residual blocks and attentions of U-Nets, blocks of transformers.

    Examples:
        >>> import diffpress as dp
        >>> dp.PruneDepth(blocks=2).kind
        'depth'
    """

    kind: Literal["depth"] = Field("depth", description="Kind of pruning.")
    remove: tuple[str, ...] = Field((), description="Names of the blocks to remove.")
    preset: Preset | None = Field(
        None, description="Removes the blocks that BK-SDM removes, from U-Nets like Stable Diffusion's."
    )
    blocks: int | None = Field(None, ge=1, description="Number of blocks to remove, chosen by `method`.")
    target: PruneTarget | None = Field(
        None, description="What remains of the network; the blocks are chosen by `method`."
    )
    method: Literal["ablation", "recoverability"] = Field(
        "ablation",
        description="ablation removes the blocks that the output needs least now, recoverability those that it needs "
        "least after training.",
    )
    samples: int = Field(8, ge=1, description="Trajectories on whose states ablation measures errors.")
    search: RecoverabilityConfig | None = Field(
        None, description="Settings of method recoverability; None means its defaults."
    )

    @model_validator(mode="before")
    @classmethod
    def _has_search(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or settings.get("method") != "recoverability":
            return settings
        return settings if settings.get("search") is not None else settings | {"search": RecoverabilityConfig()}

    @model_validator(mode="after")
    def _chooses_one_way(self) -> PruneDepthConfig:
        chosen = [name for name in ("remove", "preset", "blocks", "target") if getattr(self, name)]
        if len(chosen) != 1:
            raise ValueError(
                "exactly one of remove, preset, blocks and target chooses the blocks, "
                f"found {' and '.join(chosen) if chosen else 'none'}"
            )
        if self.method == "ablation":
            if self.search is not None:
                raise ValueError("search belongs to method recoverability, not ablation; set it, or remove search")
            return self
        if chosen[0] in ("remove", "preset"):
            raise ValueError(
                f"method recoverability chooses the blocks, but {chosen[0]} already names them; remove one"
            )
        if self.samples != type(self).model_fields["samples"].default:
            raise ValueError("samples belongs to method ablation, not recoverability; set search.samples instead")
        return self


class PruneSparsityConfig(StageConfig):
    """Set two of every four consecutive inputs of the weights to zero (2:4), for GPUs with sparse tensor cores.

    Examples:
        >>> import diffpress as dp
        >>> dp.PruneSparsity().method
        'magnitude'
    """

    kind: Literal["sparsity"] = Field("sparsity", description="Kind of pruning.")
    method: Literal["magnitude", "sparsegpt"] = Field(
        "magnitude", description="magnitude keeps the two largest of four; sparsegpt those that the output needs most."
    )
    ignored_layers: tuple[str, ...] = Field((), description="Name prefixes of layers that stay dense.")
    samples: int = Field(8, ge=1, description="Trajectories on whose states sparsegpt measures errors.")


class PruneLowRankConfig(StageConfig):
    """Replace linear layers and convolutions by two of low rank, where an engine computes these faster.

    Examples:
        >>> import diffpress as dp
        >>> dp.PruneLowRank(energy=0.95).round_to
        8
    """

    kind: Literal["low_rank"] = Field("low_rank", description="Kind of pruning.")
    energy: float | None = Field(
        None, gt=0.0, lt=1.0, description="Fraction of the sum of squared singular values that each layer keeps."
    )
    ratio: float | None = Field(None, gt=0.0, lt=1.0, description="Fraction of the full rank removed from each layer.")
    round_to: int = Field(8, ge=1, description="Ranks are multiples of this number, rounded up.")
    ignored_layers: tuple[str, ...] = Field((), description="Name prefixes of layers that stay whole.")
    engine: Engine | None = Field(
        None, description="Engine in which layers are timed; None means OpenVINO, or ONNX Runtime without it."
    )

    @model_validator(mode="after")
    def _chooses_one_way(self) -> PruneLowRankConfig:
        if (self.energy is None) == (self.ratio is None):
            raise ValueError(
                "exactly one of energy (the fraction of the squared singular values kept) and ratio (the fraction of "
                f"the rank removed) chooses the ranks, found {'none' if self.energy is None else 'both'}"
            )
        return self
