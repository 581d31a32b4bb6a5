"""Settings of the `quantize` stage: the keys of `quantize: {...}` in a recipe, one nested config per method.

A method is off if its config is None. In a recipe `true` stands for its defaults and `false` for None, and a plain name
for calibration's method:

    quantize: {format: w4a8, calibration: mse, awq: true, qat: {steps: 500}}
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from diffpress.compress.config import Config, StageConfig
from diffpress.compress.quantization.formats import FORMATS

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]
Method = Literal["max", "percentile", "mse", "entropy", "step_means"]


class CalibrationConfig(Config):
    """How the clip range of an activation is chosen from its statistics (calibration/clip_range.py)."""

    method: Method = Field("percentile", description="Rule that chooses the largest magnitude that is not clipped.")
    percentile: float = Field(
        99.99, gt=50.0, le=100.0, description="Percentage of activation values not clipped by method percentile."
    )


class SmoothQuantConfig(Config):
    """Move magnitude from activations into the weights of linear layers (algorithms/smoothquant.py)."""

    alpha: float = Field(0.5, gt=0.0, le=1.0, description="Share of the activation's magnitude moved into the weight.")


class AWQConfig(Config):
    """Scale the inputs of linear layers with 4-bit weights (algorithms/awq.py)."""

    samples: int = Field(64, ge=1, description="Number of trajectory states evaluated.")


class SVDQuantConfig(Config):
    """Compute a float low-rank branch beside each quantized linear layer (algorithms/svdquant.py)."""

    rank: int = Field(32, ge=1, description="Rank of the branch.")


class GPTQConfig(Config):
    """Round weights so that the layer's output changes least, instead of to nearest (algorithms/gptq.py)."""

    samples: int = Field(64, ge=1, description="Number of trajectory states evaluated.")


class QATConfig(Config):
    """Train the weights through the quantizers after calibration (algorithms/qat.py)."""

    steps: int = Field(200, ge=1, description="Training steps.")
    accumulate: int = Field(1, ge=1, description="Batches per step in each process, whose gradients are averaged.")
    updates: Literal["full", "low_rank"] = Field(
        "full", description="What is trained: all parameters, or low-rank factors of the quantized weights."
    )
    rank: int = Field(16, ge=1, description="Rank of the factors of updates low_rank.")
    learning_rate: float = Field(1e-5, gt=0.0, description="Peak learning rate.")
    warmup: int = Field(10, ge=0, description="Steps of linear learning-rate warmup.")
    feature_weight: float = Field(0.1, ge=0.0, description="Weight of the block feature loss.")
    trajectories: int = Field(64, ge=1, description="Number of sampled trajectories to train on.")
    ema: float = Field(0.99, ge=0.0, lt=1.0, description="Decay of the weight average per step.")
    save_every: int = Field(50, ge=1, description="Steps between saves of the training state.")


class BoundsConfig(Config):
    """Bounds of a quantized model relative to its float model; layers return to float until all bounds hold."""

    min_sqnr_db: float | None = Field(
        None, description="Minimum SQNR of the output against the float model's, in dB, on states of the trajectory."
    )
    max_frechet_ratio: float | None = Field(
        None, gt=0.0, description="Maximum Fréchet distance of the samples, as a ratio to the float model's."
    )
    max_latency_ratio: float | None = Field(
        None, gt=0.0, description="Maximum latency of one step in the engine, as a ratio to the float graph's."
    )
    max_size_mib: float | None = Field(None, gt=0.0, description="Maximum size of the model file, in MiB.")
    engine: Literal["onnxruntime", "openvino"] = Field(
        "onnxruntime", description="Engine in which latency and size are measured."
    )

    @property
    def limits(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        return {name: value for name, value in self.model_dump(exclude={"engine"}).items() if value is not None}

    @model_validator(mode="after")
    def _has_a_bound(self) -> BoundsConfig:
        if not self.limits:
            raise ValueError(f"give at least one of {', '.join(self.model_dump(exclude={'engine'}))}")
        return self


# flat keys of earlier versions -> where the setting is now
MOVED = {
    "mode": "qat",
    "rounding": "gptq",
    "rounding_samples": "gptq.samples",
    "percentile": "calibration.percentile",
    "smooth": "smoothquant.alpha",
    "svdquant_rank": "svdquant.rank",
    "target": "bounds.engine",
    **{name: f"qat.{name}" for name in QATConfig.model_fields if name != "accumulate"},  # a newer key
}


def _switch(value: Any) -> Any:
    """Read true as the defaults of a method, false as off."""
    return ({} if value else None) if isinstance(value, bool) else value


def _named(value: Any) -> Any:
    """Read a plain name as the method of calibration."""
    return {"method": value} if isinstance(value, str) else value


class QuantizeConfig(StageConfig):
    """Quantize weights and activations, with scales calibrated on the model's own sampling trajectory.

    Examples:
        >>> import diffpress as dp
        >>> dp.Quantize("int8", samples=16).format
        'int8'
    """

    renamed: ClassVar[dict[str, str]] = {
        "keep": "ignored_layers",
        "keep_fragile": "keep_sensitive_layers",
        "mixture": "format_overrides",
        "split_joins": "split_concats",
        "correct": "output_correction",
        "branch_rank": "svdquant.rank",
        "rounding_states": "gptq.samples",
    }
    of_methods: ClassVar[dict[str, str]] = MOVED

    format: FormatName = Field("int8", description="Number format of weights and activations of quantized layers.")
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
    keep_sensitive_layers: bool = Field(
        True, description="Keep sensitive layers (first, last, embeddings) out of format; false quantizes them as well."
    )
    ignored_layers: tuple[str, ...] = Field(
        (), description="Name prefixes of layers kept in float; short for format_overrides with value float."
    )
    format_overrides: dict[str, FormatName | Literal["float"]] = Field(
        {}, description="Name prefix of layers -> their format, or float; the longest matching prefix wins."
    )
    components: dict[str, FormatName | Literal["float"]] | FormatName = Field(
        {},
        description="Other components of the pipeline -> their format, as {text_encoder: int8, vae_decoder: int8}; a "
        "format alone is that of all of them.",
    )
    samples: int = Field(32, ge=1, description="Number of trajectories sampled for calibration and for other methods.")
    batch: int = Field(16, ge=1, description="Samples per evaluation; states per training batch of qat.")
    calibration: Annotated[
        CalibrationConfig, BeforeValidator(_named, json_schema_input_type=Method | CalibrationConfig)
    ] = Field(CalibrationConfig(), description="How the clip range of an activation is chosen.")
    smoothquant: Annotated[
        SmoothQuantConfig | None, BeforeValidator(_switch, json_schema_input_type=bool | SmoothQuantConfig | None)
    ] = Field(None, description="SmoothQuant for linear layers. Evaluates the trajectories a second time.")
    split_concats: bool = Field(
        False,
        description="Scale stream and skip of a concatenation separately. Evaluates the trajectories a second time.",
    )
    awq: Annotated[AWQConfig | None, BeforeValidator(_switch, json_schema_input_type=bool | AWQConfig | None)] = Field(
        None, description="AWQ for linear layers with 4-bit weights."
    )
    svdquant: Annotated[
        SVDQuantConfig | None, BeforeValidator(_switch, json_schema_input_type=bool | SVDQuantConfig | None)
    ] = Field(None, description="SVDQuant: a float low-rank branch beside each quantized linear layer.")
    gptq: Annotated[GPTQConfig | None, BeforeValidator(_switch, json_schema_input_type=bool | GPTQConfig | None)] = (
        Field(None, description="GPTQ: round weights to the smallest error of the layer's output.")
    )
    qat: Annotated[QATConfig | None, BeforeValidator(_switch, json_schema_input_type=bool | QATConfig | None)] = Field(
        None, description="Quantization-aware training after calibration."
    )
    output_correction: bool | None = Field(
        None,
        description="Measure the mean quantization error of the output per timestep; the sampler corrects it (PTQD). "
        "By default only for models of up to 100 million parameters.",
    )
    bounds: BoundsConfig | None = Field(
        None, description="Bounds on quality and cost; layers return to float until they hold."
    )

    def __init__(self, format: FormatName = "int8", **settings: Any) -> None:
        super().__init__(format=format, **settings)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # see StageConfig

    @model_validator(mode="before")
    @classmethod
    def _nest_flat_settings(cls, settings: Any) -> Any:
        return nested(settings) if isinstance(settings, dict) else settings

    @model_validator(mode="after")
    def _algorithms_fit_together(self) -> QuantizeConfig:
        if self.awq and not {"int4", "w4a8"} & {self.format, *self.format_overrides.values()}:
            raise ValueError("awq applies to 4-bit weights only: use format int4 or w4a8")
        if self.awq and (self.smoothquant or self.split_concats):
            raise ValueError("awq and smoothquant or split_concats both scale layer inputs; remove one of them")
        if self.svdquant and self.qat:
            raise ValueError("svdquant excludes qat: training changes the weights the branch is computed from")
        if self.gptq and self.format in ("fp8", "nvfp4"):
            raise ValueError(f"gptq requires an integer format, {self.format} is floating point; remove gptq")
        return self

    @model_validator(mode="after")
    def _ignored_layers_are_float(self) -> QuantizeConfig:
        for prefix in self.ignored_layers:
            if self.format_overrides.get(prefix, "float") != "float":
                raise ValueError(f"ignored_layers and format_overrides both name '{prefix}'; remove one of them")
        return self


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` with flat keys of earlier versions moved into the methods' configs; warns about each.

    A setting of a method that is off stays where it is, and is refused as an unknown key.
    """
    found = dict(settings)
    moved: dict[str, list[str]] = {}
    for old, off, method, names in (
        ("mode", "ptq", "qat", ("qat",)),
        ("rounding", "nearest", "gptq", ("gptq", "adaround")),
    ):
        if found.get(old) in (off, *names):
            moved[old] = [method]
            if found.pop(old) != off:
                found.setdefault(method, True)
    for old, path in (*MOVED.items(), ("rounding_samples", "awq.samples")):
        method, _, setting = path.partition(".")
        value, inner = settings.get(old), _named(_switch(found.get(method))) or {}
        if old not in settings or not setting or not isinstance(inner, dict):
            continue
        if old in ("smooth", "svdquant_rank") and value == 0:  # which switched the method off
            moved[old] = [path]
        elif old in ("percentile", "smooth", "svdquant_rank") or found.get(method):
            moved.setdefault(old, []).append(path)
            found[method] = {**inner, setting: value}
    for old, paths in sorted(moved.items()):
        logger.warning(f"quantize: {old} is now {' and '.join(paths)}; the old key works until diffpress 0.4")
    return {key: value for key, value in found.items() if key not in moved}
