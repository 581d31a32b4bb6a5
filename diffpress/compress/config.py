"""Stage configs: frozen, validated when constructed, without I/O. Field names are recipe keys."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.solvers import SOLVERS
from diffpress.runtime.timesteps import SPACINGS


class Config(BaseModel):
    """Base of all configs: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ScheduleConfig(Config):
    """Choose the sampling plan that all later stages and the bundle use; the weights are unchanged.

    Spacing and guidance settings left at None keep the model's own. `search` optimizes the timesteps
    (compress/sampling_schedule/search.py).
    """

    solver: Literal[tuple(SOLVERS)] = Field("dpmpp_2m", description="Solver of the sampling plan.")  # type: ignore[valid-type]
    steps: int = Field(10, ge=1, description="Number of sampling steps.")
    spacing: Literal[tuple(SPACINGS)] | None = Field(  # type: ignore[valid-type]
        None, description="Timestep spacing; None keeps the model's."
    )
    timesteps: tuple[float, ...] | None = Field(
        None, description="Explicit timesteps, in descending order; excludes steps, spacing and search."
    )
    guidance: float | None = Field(None, description="Classifier-free guidance scale; None keeps the model's.")
    guidance_interval: tuple[float, float | None] | None = Field(
        None,
        description="[low, high]: guide where low < sigma / alpha <= high (None: no limit). None keeps the model's.",
    )
    guidance_rescale: float | None = Field(
        None, ge=0.0, le=1.0, description="Rescale factor of guided outputs (phi), 0 to 1; None keeps the model's."
    )
    threshold: float | None = Field(
        None, gt=0.0, le=1.0, description="Quantile of |x_0| for dynamic thresholding; None keeps the model's setting."
    )
    eta: float = Field(0.0, ge=0.0, le=1.0, description="DDIM's eta, 0 (deterministic) to 1: share of fresh noise.")
    search: Literal["gits"] | None = Field(None, description="Search method for the timesteps; None disables it.")
    refine: int = Field(0, ge=0, description="Rounds of pattern search that refine the searched timesteps.")
    samples: int = Field(64, ge=2, description="Number of trajectories the search uses.")
    fine: int = Field(60, ge=4, description="Steps of the fine reference trajectories of the search.")
    batch: int = Field(32, ge=1, description="Samples per batch of the search.")

    @model_validator(mode="after")
    def _timesteps_have_one_source(self) -> ScheduleConfig:
        if self.timesteps is not None:
            taken = {"steps", "spacing", "search"} & self.model_fields_set
            if taken:
                raise ValueError(f"timesteps is set explicitly: remove {', '.join(sorted(taken))}")
        if self.search is None:
            idle = {"refine", "samples", "fine", "batch"} & self.model_fields_set
            if idle:
                raise ValueError(f"{', '.join(sorted(idle))}: only used by a search; set search: gits")
        elif SOLVERS[self.solver].noisy or self.eta > 0:
            raise ValueError(
                f"search: {self.solver} with eta {self.eta:g} adds noise; use a deterministic solver, eta 0"
            )
        elif self.fine <= self.steps:
            raise ValueError(f"search: fine {self.fine} must be greater than steps {self.steps}")
        return self


class PruneConfig(Config):
    """Remove channels and attention heads by importance."""

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


class TensorRTConfig(Config):
    """Build TensorRT engines: target GPUs and the fields of runtime.engines.tensorrt.options.BuildOptions."""

    compute_capabilities: tuple[str, ...] = Field(
        (), description='GPUs to build engines for, as "8.9"; empty means the GPU of this machine.'
    )
    batch: tuple[int, int, int] = Field(
        (1, 8, 64), description="Samples per evaluation: minimum, optimum, maximum of the optimization profile."
    )
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = Field(
        None,
        description="Smallest and largest image as (height, width), in pixels; None allows only the model's own size.",
    )
    optimization_level: int = Field(3, description="0 builds fastest, 5 searches longest.")
    workspace_mib: int | None = Field(
        None, description="GPU memory that kernels may use at run time, in MiB; None means all of it."
    )
    tf32: bool = Field(False, description="Round the factors of float32 products to TF32 (10 mantissa bits).")
    sparse_weights: bool = Field(False, description="Use 2:4 sparse kernels for weights with that sparsity.")
    stream_weights: bool = Field(False, description="Keep weights that do not fit into GPU memory in main memory.")
    strip_weights: bool = Field(
        False, description="Leave the weights out of the engine file; they are read from the ONNX graph at load."
    )
    version_compatible: bool = Field(False, description="Build engines that later TensorRT versions can also run.")
    hardware_compatible: str = Field(
        "none", description="Other GPUs that can run the engine: none, ampere_plus or same_compute_capability."
    )

    @property
    def options(self) -> BuildOptions:
        """Build options of every engine."""
        return BuildOptions(**self.model_dump(exclude={"compute_capabilities"}))

    @model_validator(mode="after")
    def _options_are_valid(self) -> TensorRTConfig:
        try:
            _ = self.options
        except InvalidInputError as error:
            raise ValueError(str(error)) from error
        return self


class ExportConfig(Config):
    """Export the result as a bundle."""

    targets: tuple[Literal["onnx", "openvino", "tensorrt"], ...] = Field(
        ("onnx",), description="Targets to export for."
    )
    revert_slower: bool = Field(
        False,
        description="Use the float graph in engines where the quantized graph is slower, measured on this machine.",
    )
    fixed_timesteps: bool = Field(
        False,
        description="Fold the timestep embedding into constants; the bundle then accepts only its plan's timesteps.",
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="Precision of the result's float graphs; the baseline stays fp32."
    )
    tensorrt: TensorRTConfig = Field(TensorRTConfig(), description="Settings of target tensorrt.")


class GatesConfig(Config):
    """Gates that the result must pass; the run fails with exit code 1 otherwise."""

    frechet_ratio: float | None = Field(
        None, gt=0.0, description="Maximum Fréchet distance of the samples, as a ratio to the teacher's."
    )
    parity_sqnr_db: float | None = Field(
        None, description="Minimum SQNR between the engine's and the torch model's output, in dB."
    )


class EvaluateConfig(Config):
    """Score samples of the result and of the teacher."""

    samples: int = Field(256, ge=8, description="Samples per seed.")
    seeds: int = Field(3, ge=1, description="Number of seeds; each gives one set of samples.")
    batch: int = Field(64, ge=1, description="Samples per batch.")
