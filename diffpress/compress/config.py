"""Configs: frozen, validated when constructed, without I/O. Field names are recipe keys.

Pydantic finds what is wrong; `input_error` makes one line of it, the same for a recipe and for an object in Python.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError, unknown_name


class Config(BaseModel):
    """Base of all configs: frozen, and unknown keys are refused.

    Attributes:
        renamed: Former keys and their present names, for the message that refuses one.
        of_methods: Former keys and the method's setting that they are now; refused where the method is off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed: ClassVar[dict[str, str]] = {}
    of_methods: ClassVar[dict[str, str]] = {}


class StageConfig(Config):
    """Base of the configs of stages: a call with wrong settings raises InvalidInputError, as a recipe does."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise input_error(error, type(self), f"diffpress.{self.__repr_name__()}") from error

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # `model_validate` raises ValidationError

    def __repr_name__(self) -> str:
        return type(self).__name__.removesuffix("Config")  # the public name, as in diffpress.Prune


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


Target = Literal["onnx", "openvino", "tensorrt", "sampler", "triton", "web", "genai"]
ExportPrecision = Literal["fp32", "fp16", "bf16"]
LoraLayers = Literal["linear", "all"]


class ExportConfig(Config):
    """Export the result as a bundle."""

    renamed: ClassVar[dict[str, str]] = {"fixed_plan": "fixed_timesteps"}

    targets: tuple[Target, ...] = Field(("onnx",), description="Targets to export for.")
    revert_slower: bool = Field(
        False,
        description="Use the float graph in engines where the quantized graph is slower, measured on this machine.",
    )
    fixed_timesteps: bool = Field(
        False,
        description="Fold the timestep embedding into constants; the bundle then accepts only its plan's timesteps.",
    )
    precision: ExportPrecision = Field(
        "fp32", description="Precision of the result's float graphs; the baseline stays fp32."
    )
    size: tuple[int, int] | None = Field(
        None,
        description="Height and width of the image in pixels, to fix them in the graphs; None leaves them as traced.",
    )
    image_inputs: bool = Field(
        False, description="Export the encoder of the autoencoder, so that the bundle can start from images."
    )
    nearest_plan: bool = Field(
        False,
        description="For target genai: export the nearest sampling plan that OpenVINO GenAI can follow, if it cannot "
        "follow the model's own.",
    )
    controlnet: tuple[str, ...] = Field(
        (), description="ControlNets to export with the result, folders or hub ids, in the order of their images."
    )
    lora_slots: int = Field(
        0, ge=0, le=64, description="LoRAs that can be set in the bundle at the same time; 0 leaves the slots out."
    )
    lora_rank: int = Field(32, ge=1, le=1024, description="Largest rank of a LoRA that a slot takes.")
    lora_layers: LoraLayers = Field(
        "linear",
        description="Layers with slots: `linear` layers and convolutions of 1 x 1, or `all`, also larger convolutions.",
    )
    threads: int | None = Field(
        None, description="Processor threads of the engines that are verified and timed; None means all."
    )
    web_runtime: str | None = Field(
        None,
        description="Folder of the npm package onnxruntime-web, for target web; None takes that in node_modules.",
    )
    tensorrt: TensorRTConfig = Field(TensorRTConfig(), description="Settings of target tensorrt.")


class GatesConfig(Config):
    """Gates that the result must pass; the run fails with exit code 1 otherwise."""

    frechet_ratio: float | None = Field(
        None, gt=0.0, description="Maximum Fréchet distance of the samples, as a ratio to the teacher's."
    )
    parity_sqnr_db: float | None = Field(
        None,
        description="Minimum SQNR between the engine's and the float torch model's samples, in dB, in place of the "
        "built-in bounds.",
    )


EVALUATE_FILES = ("features", "reference", "prompts", "candidates")  # settings of EvaluateConfig that name files


class EvaluateConfig(Config):
    """Score samples of the result and of the teacher."""

    samples: int = Field(256, ge=8, description="Samples per seed.")
    seeds: int = Field(3, ge=1, description="Number of seeds; each gives one set of samples.")
    batch: int = Field(64, ge=1, description="Samples per batch.")
    features: Path | None = Field(
        None,
        description="ONNX image encoder for the Fréchet distance and KID; None means the built-in one, which fits "
        "28 x 28 grey images only.",
    )
    reference: Path | None = Field(
        None,
        description="Real images (.npz or a folder) for the features; None means other samples of the uncompressed "
        "model, or the built-in images for the built-in features.",
    )
    prompts: Path | None = Field(
        None,
        description="Prompts of a text model, one per line, used in turn; None means those of the recipe's data, or "
        "else the built-in ones.",
    )
    candidates: Path | None = Field(
        None,
        description="Texts for the retrieval accuracy, one per line: an image is correct if its nearest text is the "
        "longest one that its prompt contains; None means the distinct prompts.",
    )


def input_error(error: ValidationError, config: Any, where: str) -> InvalidInputError:
    """Return the first problem that pydantic found, as one line; keys that do not exist come first.

    Args:
        error: What was raised for the settings of `config`.
        config: A config class, or a union of classes discriminated by `kind`.
        where: Path of the settings, as "recipe.yaml: stages[0].prune".
    """
    problems = error.errors(include_url=False)
    unknown = [problem for problem in problems if problem["type"] in ("extra_forbidden", "invalid_key")]
    first = min(unknown or problems[:1], key=lambda problem: len(problem["loc"]))
    kind, path = config, first["loc"]
    if not isinstance(config, type):
        kinds = {member.model_fields["kind"].default: member for member in config_classes(config)}
        if first["type"] == "union_tag_invalid":
            return unknown_name(f"{where}: kind", first["ctx"]["tag"], kinds)
        kind, path = kinds[path[0]], path[1:]  # the path in a union begins with the kind
    if unknown:
        *parents, key = path
        for parent in parents:
            where, kind = f"{where}.{parent}", config_in(kind.model_fields[str(parent)].annotation)
        if key in kind.of_methods:
            setting = kind.of_methods[key]
            method = setting.partition(".")[0]
            return InvalidInputError(f"{where}.{key} belongs to {method}, which is off; set {setting}, or remove it")
        return unknown_key(key, tuple(kind.model_fields), where, kind.renamed)
    if not path:  # a rule between several keys
        return InvalidInputError(f"{where}: {first['msg'].removeprefix('Value error, ')}")
    return InvalidInputError(f"{'.'.join(map(str, (where, *path)))}: {first['msg']}, found {first['input']!r}")


def unknown_key(key: Any, known: Sequence[str], where: str, renamed: dict[str, str] | None = None) -> InvalidInputError:
    """Return the error for a key at the path `where` that does not exist: its new name, or the nearest match."""
    if renamed and key in renamed:
        return InvalidInputError(f"{where}.{key} is now called '{renamed[key]}'; rename the key")
    near = difflib.get_close_matches(str(key), known, 1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
    file, colon, path = where.rpartition(": ")
    return InvalidInputError(f"{file}{colon}unknown key '{f'{path}.{key}'.lstrip('.')}'; {hint}")


def union_by_kind(configs: Sequence[type[StageConfig]], default: str) -> Any:
    """Return the union of the classes, discriminated by `kind`; settings without one are of the kind `default`."""

    def with_kind(settings: Any) -> Any:
        return {"kind": default, **settings} if isinstance(settings, dict) else settings

    union: Any = Union[tuple(configs)]  # noqa: UP007 - the members are known at run time only
    return Annotated[union, Field(discriminator="kind"), BeforeValidator(with_kind)]


def config_classes(config: Any) -> tuple[type[Config], ...]:
    """Return the class itself, or the classes of an annotated union."""
    return (config,) if isinstance(config, type) else get_args(get_args(config)[0])


def config_in(annotation: Any) -> type[Config] | None:
    """Return the config class that a field holds, as `BoundsConfig | None` does."""
    kinds = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, Config)), None)
