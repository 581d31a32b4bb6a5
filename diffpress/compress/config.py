"""Stage configs: frozen, validated when constructed, without I/O. Field names are recipe keys."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError


class Config(BaseModel):
    """Base of all configs: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
