"""Stage configs: frozen, validated when made, no I/O. Field names are the keys a recipe may use."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.solvers import SOLVERS
from diffpress.runtime.timesteps import SPACINGS


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScheduleConfig(Config):
    """How the model will be sampled from here on; weights are untouched.

    `spacing`, `timesteps` and those of guidance None keep what the model came with; `threshold` is the ratio of dynamic
    thresholding. A `search` chooses the timesteps (compress/sampling_schedule/search.py) on `samples` trajectories of `fine`
    steps, and moves them for `refine` rounds.
    """

    solver: Literal[tuple(SOLVERS)] = "dpmpp_2m"  # type: ignore[valid-type]
    steps: int = Field(10, ge=1)
    spacing: Literal[tuple(SPACINGS)] | None = None  # type: ignore[valid-type]
    timesteps: tuple[float, ...] | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float | None] | None = None
    guidance_rescale: float | None = Field(None, ge=0.0, le=1.0)
    threshold: float | None = Field(None, gt=0.0, le=1.0)
    eta: float = Field(0.0, ge=0.0, le=1.0)
    search: Literal["gits"] | None = None
    refine: int = Field(0, ge=0)
    samples: int = Field(64, ge=2)
    fine: int = Field(60, ge=4)
    batch: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _one_way_to_timesteps(self) -> ScheduleConfig:
        if self.timesteps is not None:
            taken = {"steps", "spacing", "search"} & self.model_fields_set
            if taken:
                raise ValueError(f"timesteps are given: leave out {', '.join(sorted(taken))}")
        if self.search is None:
            idle = {"refine", "samples", "fine", "batch"} & self.model_fields_set
            if idle:
                raise ValueError(f"{', '.join(sorted(idle))}: for a search alone; set search: gits")
        elif SOLVERS[self.solver].noisy or self.eta > 0:
            raise ValueError(f"search: {self.solver} with eta {self.eta:g} adds noise; take one that does not")
        elif self.fine <= self.steps:
            raise ValueError(f"search: fine {self.fine} must be more than the {self.steps} steps")
        return self


class PruneConfig(Config):
    """`ratio` is the fraction of channels (and attention heads) removed."""

    method: Literal["taylor", "magnitude", "random"] = "taylor"
    ratio: float = Field(0.3, gt=0.0, lt=1.0)
    scope: Literal["local", "global"] = "local"
    round_to: int = Field(8, ge=1)
    batch: int = Field(32, ge=1)
    timesteps: int = Field(24, ge=1)
    threshold: float = Field(0.05, ge=0.0, le=1.0)


FormatName = Literal["int8", "int8_weight_only", "fp8", "int4", "w4a8", "nvfp4"]

QAT_SETTINGS = (
    *("steps", "updates", "rank", "learning_rate", "warmup"),
    *("feature_weight", "trajectories", "ema", "save_every"),
)


class BoundsConfig(Config):
    """What a quantized model must keep, against the float model it was made from; layers go back to float for it.

    The SQNR of its output on states of its trajectory, the Fréchet distance of its samples, one step in the target
    engine, and its file.
    """

    min_sqnr_db: float | None = None
    max_frechet_ratio: float | None = Field(None, gt=0.0)
    max_latency_ratio: float | None = Field(None, gt=0.0)
    max_size_mib: float | None = Field(None, gt=0.0)

    @model_validator(mode="after")
    def _something_is_bound(self) -> BoundsConfig:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self


class QuantizeConfig(Config):
    """Weights and activations in `format` (compress/quantization/formats.py), calibrated on the model's own trajectory.

    `calibration` says how an activation's scale is read from what was seen (compress/quantization/calibration/clip_range.py); `smooth`
    moves unevenness from the inputs of linear layers into their weights (SmoothQuant's alpha, 0 for none), and
    `split_concats` gives stream and skip factors of their own where they are joined; both sample twice.
    `layers` names the kinds that take the format; the linear layers of the others store int8 weights only. `outputs`
    rounds what these layers write too and, in U-Nets, the sums of blocks (compress/quantization/unified_scales.py). `format_overrides`
    gives layers by the beginning of their names another format, or float; the longest that fits wins, and `ignored_layers`
    is short for float. `keep_sensitive_layers` false quantizes fragile layers (first and last, embeddings) like the rest.
    `bounds` returns layers to float until they are kept, by what each is worth in the engine `target`.
    `output_correction` measures what rounding does to the output on the average at each step, for the sampler to take off; mode
    qat trains that away instead. `awq` scales the inputs of linear layers with 4-bit weights, `rounding` gptq takes
    weights up or down by what that does to outputs; both look at `rounding_samples` states of the trajectory. Linear
    layers keep the `svdquant_rank` largest singular values of their weights in float, beside what is rounded. From
    `steps` on the settings are those of mode qat, which trains `batch` states a step, of `trajectories` samples, in
    full or (`updates` low_rank) through factors of `rank`.
    """

    format: FormatName = "int8"
    mode: Literal["ptq", "qat"] = "ptq"
    calibration: Literal["max", "percentile", "mse", "entropy", "step_means"] = "percentile"
    percentile: float = Field(99.99, gt=50.0, le=100.0)
    smooth: float = Field(0.0, ge=0.0, le=1.0)
    split_concats: bool = False
    layers: tuple[Literal["conv", "linear"], ...] = ("conv", "linear")
    outputs: bool = True
    reduce_range: bool = True
    samples: int = Field(32, ge=1)
    batch: int = Field(16, ge=1)
    ignored_layers: tuple[str, ...] = ()
    keep_sensitive_layers: bool = True
    bounds: BoundsConfig | None = None
    target: Literal["onnxruntime", "openvino"] = "onnxruntime"
    format_overrides: dict[str, FormatName | Literal["float"]] = {}
    output_correction: bool = True
    awq: bool = False
    svdquant_rank: int = Field(0, ge=0)
    rounding: Literal["nearest", "gptq"] = "nearest"
    rounding_samples: int = Field(64, ge=1)
    steps: int = Field(200, ge=1)
    updates: Literal["full", "low_rank"] = "full"
    rank: int = Field(16, ge=1)
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

    @model_validator(mode="after")
    def _weights_fit_their_rounding(self) -> QuantizeConfig:
        if self.awq and not {"int4", "w4a8"} & {self.format, *self.format_overrides.values()}:
            raise ValueError("awq is for 4-bit weights: take format int4 or w4a8")
        if self.awq and (self.smooth or self.split_concats):
            raise ValueError("awq and smooth or split_concats would both scale inputs; leave one of them out")
        if self.svdquant_rank and self.mode == "qat":
            raise ValueError("svdquant_rank is for mode ptq: training would change what the branch was cut from")
        if self.rounding == "gptq" and self.format in ("fp8", "nvfp4"):
            raise ValueError(f"gptq rounds to integers, and {self.format} has none; leave rounding out")
        return self

    @model_validator(mode="after")
    def _kept_is_float(self) -> QuantizeConfig:
        for prefix in self.ignored_layers:
            if self.format_overrides.get(prefix, "float") != "float":
                raise ValueError(f"ignored_layers and format_overrides both name '{prefix}'; leave it in one of them")
        return self


class TensorRTConfig(Config):
    """Plans of target tensorrt: the GPUs they are for, and diffpress.runtime.engines.tensorrt.options.BuildOptions."""

    compute_capabilities: tuple[str, ...] = ()
    batch: tuple[int, int, int] = (1, 8, 64)
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    optimization_level: int = 3
    workspace_mib: int | None = None
    tf32: bool = False
    sparse_weights: bool = False
    stream_weights: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: str = "none"

    @property
    def options(self) -> BuildOptions:
        return BuildOptions(**self.model_dump(exclude={"compute_capabilities"}))

    @model_validator(mode="after")
    def _can_be_built(self) -> TensorRTConfig:
        try:
            _ = self.options
        except InvalidInputError as error:
            raise ValueError(str(error)) from error
        return self


class ExportConfig(Config):
    """`revert_slower`: engines that the quantized graph slows down, on the machine of the run, take the float graph.

    `fixed_timesteps`: time embeddings become constants, and the bundle knows the timesteps of its own plan alone.
    `precision`: of the float graphs of the result; the baseline stays fp32. `tensorrt`: of that target alone.
    """

    targets: tuple[Literal["onnx", "openvino", "tensorrt"], ...] = ("onnx",)
    revert_slower: bool = False
    fixed_timesteps: bool = False
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    tensorrt: TensorRTConfig = TensorRTConfig()


class GatesConfig(Config):
    """Bounds that the result must keep: a Fréchet distance relative to the teacher's, and engine parity in dB."""

    frechet_ratio: float | None = Field(None, gt=0.0)
    parity_sqnr_db: float | None = None


class EvaluateConfig(Config):
    samples: int = Field(256, ge=8)
    seeds: int = Field(3, ge=1)
    batch: int = Field(64, ge=1)
