"""Build options of a TensorRT engine, stored in the manifest so that the runtime can rebuild the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from diffpress.runtime.errors import InvalidInputError, unknown_name

HARDWARE = ("none", "ampere_plus", "same_compute_capability")
# boolean options -> help text
SWITCHES = {
    "tf32": "compute float32 products in TF32",
    "sparse_weights": "use sparse kernels for weights that are 2:4 sparse",
    "stream_weights": "keep weights in host memory that do not fit in GPU memory",
    "strip_weights": "omit the weights from the engine; they are read from the graph (the build needs a GPU)",
    "version_compatible": "also run in later library versions (tensorrt only, not tensorrt-rtx)",
}
Sizes = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class BuildOptions:
    """Options of a TensorRT build.

    Attributes:
        batch: Smallest batch size, the one the engine is tuned for, and the largest.
        sizes: Smallest and largest image (height, width) in pixels; None allows only the model's size.
        optimization_level: Builder optimization level, from 0 (fastest build) to 5 (longest search).
        workspace_mib: GPU memory in MiB for the workspace of kernels; None for all.
        tf32: Round the operands of float32 products to 10 mantissa bits.
        sparse_weights: Use sparse kernels for weights that are 2:4 sparse.
        stream_weights: Keep weights in host memory that do not fit in GPU memory.
        strip_weights: Omit the weights from the file; they are read from the ONNX graph at load.
        version_compatible: Also run in later versions of the library.
        hardware_compatible: Also run on other GPUs: 'ampere_plus' or 'same_compute_capability'.
    """

    batch: tuple[int, int, int] = (1, 8, 64)
    sizes: Sizes | None = None
    optimization_level: int = 3
    workspace_mib: int | None = None
    tf32: bool = False
    sparse_weights: bool = False
    stream_weights: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: str = "none"

    def __post_init__(self) -> None:
        low, opt, high = self.batch
        if not 1 <= low <= opt <= high:
            raise InvalidInputError(
                f"batch {low} {opt} {high}: expected the smallest, usual and largest size, in order and at least 1"
            )
        if not 0 <= self.optimization_level <= 5:
            raise InvalidInputError(f"optimization level {self.optimization_level}: must be in 0..5")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InvalidInputError(f"workspace of {self.workspace_mib} MiB: must be at least 1; omit it for no limit")
        if self.hardware_compatible not in HARDWARE:
            raise unknown_name("hardware compatibility", self.hardware_compatible, HARDWARE)
        if self.sizes is not None:
            smallest, largest = self.sizes
            if min(smallest) < 1 or any(a > b for a, b in zip(smallest, largest, strict=True)):
                raise InvalidInputError(
                    f"sizes {smallest} to {largest}: expected the smallest and largest (height, width) in pixels"
                )

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: Any, where: str) -> BuildOptions:
        """Read options written by `to_json`; raises InvalidInputError naming `where` for unknown or mistyped ones."""
        known = {f.name for f in fields(BuildOptions)}
        if not isinstance(data, Mapping) or not set(data) <= known:
            raise InvalidInputError(
                f"{where}: the engine's build options are unknown to this version of diffpress; export it again"
            )
        try:
            return BuildOptions(**{name: _typed(name, value) for name, value in data.items()})
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"{where}: build options: {error}; export it again") from error


def _typed(name: str, value: Any) -> Any:
    if name == "batch":
        low, opt, high = (_integer(entry) for entry in value)
        return low, opt, high
    if name == "sizes" and value is not None:
        (a, b), (c, d) = value
        return (_integer(a), _integer(b)), (_integer(c), _integer(d))
    kind = type(getattr(BuildOptions(), name))
    if value is not None and kind in (bool, str) and not isinstance(value, kind):
        raise ValueError(f"{name} {value!r} is not a {kind.__name__}")
    return _integer(value) if name in ("optimization_level", "workspace_mib") and value is not None else value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not an integer")
    return value
