"""Stage configs: frozen, validated when made, no I/O. Field names are the keys a recipe may use."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.schedule import GRIDS
from runtime.solvers import SOLVERS


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScheduleConfig(Config):
    """How the model will be sampled from here on; weights are untouched.

    `grid` and `guidance` None keep what the model came with.
    """

    solver: Literal[tuple(SOLVERS)] = "dpmpp_2m"  # type: ignore[valid-type]
    steps: int = Field(10, ge=1)
    grid: Literal[tuple(GRIDS)] | None = None  # type: ignore[valid-type]
    guidance: float | None = None
    eta: float = Field(0.0, ge=0.0, le=1.0)


class PruneConfig(Config):
    """`ratio` is the fraction of channels (and attention heads) removed."""

    method: Literal["taylor", "magnitude", "random"] = "taylor"
    ratio: float = Field(0.3, gt=0.0, lt=1.0)
    scope: Literal["local", "global"] = "local"
    round_to: int = Field(8, ge=1)
    batch: int = Field(32, ge=1)
    timesteps: int = Field(24, ge=1)
    threshold: float = Field(0.05, ge=0.0, le=1.0)


class DistillConfig(Config):
    """`recover` trains the pruned student to answer like the model it was pruned from."""

    kind: Literal["recover"] = "recover"
    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)
    learning_rate: float = Field(5e-4, gt=0.0)
    warmup: int = Field(20, ge=0)
    output_weight: float = Field(1.0, ge=0.0)
    feature_weight: float = Field(0.1, ge=0.0)
    task_weight: float = Field(0.0, ge=0.0)
    timesteps: Literal["all", "plan"] = "all"
    ema: float = Field(0.99, ge=0.0, lt=1.0)
    save_every: int = Field(100, ge=1)


QAT_SETTINGS = ("steps", "learning_rate", "warmup", "feature_weight", "trajectories", "ema", "save_every")


class QuantizeConfig(Config):
    """int8 weights (per output channel) and activations (per tensor), calibrated on the model's own trajectory.

    `layers` names the kinds that compute in integers; the linear layers of the others store int8 weights only. From
    `steps` on the settings are those of mode qat, which trains `batch` states a step, of `trajectories` samples.
    """

    format: Literal["int8"] = "int8"
    mode: Literal["ptq", "qat"] = "ptq"
    calibration: Literal["max", "percentile", "entropy"] = "percentile"
    percentile: float = Field(99.99, gt=50.0, le=100.0)
    layers: tuple[Literal["conv", "linear"], ...] = ("conv", "linear")
    outputs: bool = True
    reduce_range: bool = True
    samples: int = Field(32, ge=1)
    batch: int = Field(16, ge=1)
    keep: tuple[str, ...] = ()
    steps: int = Field(200, ge=1)
    learning_rate: float = Field(1e-5, gt=0.0)
    warmup: int = Field(10, ge=0)
    feature_weight: float = Field(0.1, ge=0.0)
    trajectories: int = Field(64, ge=1)
    ema: float = Field(0.99, ge=0.0, lt=1.0)
    save_every: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _training_is_qat(self) -> QuantizeConfig:
        fields = type(self).model_fields
        idle = [name for name in QAT_SETTINGS if getattr(self, name) != fields[name].default]
        if self.mode == "ptq" and idle:
            raise ValueError(f"{idle[0]} is a setting of mode qat, and mode ptq trains nothing")
        return self


class ExportConfig(Config):
    targets: tuple[Literal["onnx", "openvino", "tensorrt"], ...] = ("onnx",)


class GatesConfig(Config):
    """Bounds that the result must keep: a Fréchet distance relative to the teacher's, and engine parity in dB."""

    frechet_ratio: float | None = Field(None, gt=0.0)
    parity_sqnr_db: float | None = None


class EvaluateConfig(Config):
    samples: int = Field(256, ge=8)
    seeds: int = Field(3, ge=1)
    batch: int = Field(64, ge=1)
