"""Settings of the `quantize` stage: the keys of `quantize: {...}` in a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from diffpress.compress.config import Config

FormatName = Literal["int8", "int8_weight_only", "fp8", "int4", "w4a8", "nvfp4"]

QAT_SETTINGS = (
    *("steps", "updates", "rank", "learning_rate", "warmup"),
    *("feature_weight", "trajectories", "ema", "save_every"),
)


class BoundsConfig(Config):
    """Bounds of a quantized model relative to its float model; layers return to float until all bounds hold."""

    min_sqnr_db: float | None = Field(
        None, description="Minimum SQNR of the output against the float model's, in dB, on states of the trajectory."
    )
    max_frechet_ratio: float | None = Field(
        None, gt=0.0, description="Maximum Fréchet distance of the samples, as a ratio to the float model's."
    )
    max_latency_ratio: float | None = Field(
        None, gt=0.0, description="Maximum latency of one step in the target engine, as a ratio to the float graph's."
    )
    max_size_mib: float | None = Field(None, gt=0.0, description="Maximum size of the model file, in MiB.")

    @model_validator(mode="after")
    def _has_a_bound(self) -> BoundsConfig:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self


class QuantizeConfig(Config):
    """Quantize weights and activations, with scales calibrated on the model's own sampling trajectory.

    The settings in QAT_SETTINGS apply to mode qat only.
    """

    format: FormatName = Field("int8", description="Number format of weights and activations of quantized layers.")
    mode: Literal["ptq", "qat"] = Field(
        "ptq", description="ptq calibrates scales only; qat also trains the weights through the quantizers."
    )
    calibration: Literal["max", "percentile", "mse", "entropy", "step_means"] = Field(
        "percentile", description="How the clip range of an activation is chosen from its statistics."
    )
    percentile: float = Field(
        99.99, gt=50.0, le=100.0, description="Percentage of activation values not clipped by calibration percentile."
    )
    smooth: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="SmoothQuant's alpha for linear layers; 0 disables. Needs a second calibration run.",
    )
    split_concats: bool = Field(
        False,
        description="Scale stream and skip of a concatenation separately. Needs a second calibration run.",
    )
    layers: tuple[Literal["conv", "linear"], ...] = Field(
        ("conv", "linear"),
        description="Kinds of layers quantized to format; other linear layers store int8 weights only.",
    )
    outputs: bool = Field(
        True, description="Also quantize the outputs of integer layers and, in U-Nets, the residual sums of blocks."
    )
    reduce_range: bool = Field(
        True, description="Limit 8-bit weights to -64..64: prevents 16-bit overflow on CPUs without VNNI."
    )
    samples: int = Field(32, ge=1, description="Number of samples generated for calibration.")
    batch: int = Field(16, ge=1, description="Samples per calibration batch; states per step of mode qat.")
    ignored_layers: tuple[str, ...] = Field(
        (), description="Name prefixes of layers kept in float; short for format_overrides with value float."
    )
    keep_sensitive_layers: bool = Field(
        True, description="Keep sensitive layers (first, last, embeddings) out of format; false quantizes them as well."
    )
    bounds: BoundsConfig | None = Field(
        None, description="Bounds on quality and cost; layers return to float until they hold."
    )
    target: Literal["onnxruntime", "openvino"] = Field(
        "onnxruntime", description="Engine in which bounds measures latency and size."
    )
    format_overrides: dict[str, FormatName | Literal["float"]] = Field(
        {}, description="Name prefix of layers -> their format, or float; the longest matching prefix wins."
    )
    output_correction: bool = Field(
        True,
        description="Measure the mean quantization error of the output per timestep; the sampler corrects it (PTQD).",
    )
    awq: bool = Field(False, description="Scale the inputs of linear layers with 4-bit weights (AWQ).")
    svdquant_rank: int = Field(
        0,
        ge=0,
        description="Rank of the float low-rank branch beside each quantized linear layer (SVDQuant); 0 disables.",
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest", description="Weight rounding: to nearest, or to the smallest error of the layer's output (GPTQ)."
    )
    rounding_samples: int = Field(64, ge=1, description="Number of trajectory states that awq and gptq evaluate.")
    steps: int = Field(200, ge=1, description="Training steps (mode qat).")
    updates: Literal["full", "low_rank"] = Field(
        "full", description="What mode qat trains: all parameters, or low-rank factors of the quantized weights."
    )
    rank: int = Field(16, ge=1, description="Rank of the factors of updates low_rank (mode qat).")
    learning_rate: float = Field(1e-5, gt=0.0, description="Learning rate (mode qat).")
    warmup: int = Field(10, ge=0, description="Steps of linear learning rate warmup (mode qat).")
    feature_weight: float = Field(0.1, ge=0.0, description="Weight of the block feature loss (mode qat).")
    trajectories: int = Field(64, ge=1, description="Number of sampled trajectories to train on (mode qat).")
    ema: float = Field(0.99, ge=0.0, lt=1.0, description="Decay of the weight average per step (mode qat).")
    save_every: int = Field(50, ge=1, description="Steps between saves of the training state (mode qat).")

    @model_validator(mode="after")
    def _qat_settings_need_mode_qat(self) -> QuantizeConfig:
        fields = type(self).model_fields
        idle = [name for name in QAT_SETTINGS if getattr(self, name) != fields[name].default]
        if self.mode == "ptq" and idle:
            raise ValueError(f"{idle[0]} is a setting of mode qat; mode ptq does not train")
        return self

    @model_validator(mode="after")
    def _algorithms_fit_format_and_mode(self) -> QuantizeConfig:
        if self.awq and not {"int4", "w4a8"} & {self.format, *self.format_overrides.values()}:
            raise ValueError("awq applies to 4-bit weights only: use format int4 or w4a8")
        if self.awq and (self.smooth or self.split_concats):
            raise ValueError("awq and smooth or split_concats both scale layer inputs; remove one of them")
        if self.svdquant_rank and self.mode == "qat":
            raise ValueError(
                "svdquant_rank requires mode ptq: training changes the weights the branch is computed from"
            )
        if self.rounding == "gptq" and self.format in ("fp8", "nvfp4"):
            raise ValueError(
                f"rounding gptq requires an integer format, {self.format} is floating point; remove rounding"
            )
        return self

    @model_validator(mode="after")
    def _ignored_layers_are_float(self) -> QuantizeConfig:
        for prefix in self.ignored_layers:
            if self.format_overrides.get(prefix, "float") != "float":
                raise ValueError(f"ignored_layers and format_overrides both name '{prefix}'; remove one of them")
        return self
