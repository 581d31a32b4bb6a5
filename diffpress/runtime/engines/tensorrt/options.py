"""How a TensorRT plan is built, as one small value that the manifest keeps, so that the runtime can build it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from diffpress.runtime.errors import InvalidInputError, unknown_name

HARDWARE = ("none", "ampere_plus", "same_compute_capability")
# the options that are switches, with their help
SWITCHES = {
    "tf32": "round the factors of float32 products to TF32",
    "sparse_weights": "use kernels for weights that are 2:4 sparse",
    "stream_weights": "keep in main memory what does not fit into the GPU's",
    "strip_weights": "leave the weights out of the plan, to be read from the graph (builds on a GPU alone)",
    "version_compatible": "run in later versions too (tensorrt alone, not tensorrt-rtx)",
}
Sizes = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class BuildOptions:
    """batch                 samples in one call: the fewest, those it is tuned for, the most
    sizes                 smallest and largest image (height, width) in pixels, None for the model's own size alone
    optimization_level    0 builds fastest, 5 searches longest
    workspace_mib         GPU memory that its kernels may take while they run, None for all
    tf32                  round the factors of float32 products to 10 bits of mantissa
    sparse_weights        use 2:4 sparse kernels for weights that are sparse like that
    stream_weights        keep weights in main memory that do not fit into the GPU's
    strip_weights         leave the weights out of the file; they are read from the ONNX graph at load
    version_compatible    run in later versions of the library too
    hardware_compatible   run on other GPUs too: 'ampere_plus' or 'same_compute_capability'
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
                f"batch {low} {opt} {high}: give the fewest, the usual and the most, from 1 upwards"
            )
        if not 0 <= self.optimization_level <= 5:
            raise InvalidInputError(f"optimization level {self.optimization_level}: must lie in 0..5")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InvalidInputError(f"workspace of {self.workspace_mib} MiB: at least 1, or leave it out")
        if self.hardware_compatible not in HARDWARE:
            raise unknown_name("hardware compatibility", self.hardware_compatible, HARDWARE)
        if self.sizes is not None:
            smallest, largest = self.sizes
            if min(smallest) < 1 or any(a > b for a, b in zip(smallest, largest, strict=True)):
                raise InvalidInputError(
                    f"sizes {smallest} to {largest}: give the smallest and the largest, height and width"
                )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Any, where: str) -> BuildOptions:
        """Read them back; anything unknown or of the wrong type raises InvalidInputError naming `where`."""
        known = {f.name for f in fields(BuildOptions)}
        if not isinstance(data, Mapping) or not set(data) <= known:
            raise InvalidInputError(
                f"{where}: the plan's build options are not those of this diffpress; export it again"
            )
        try:
            return BuildOptions(**{name: _typed_conditioning(name, value) for name, value in data.items()})
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"{where}: build options: {error}; export it again") from error


def _typed_conditioning(name: str, value: Any) -> Any:
    if name == "batch":
        low, opt, high = (_whole(entry) for entry in value)
        return low, opt, high
    if name == "sizes" and value is not None:
        (a, b), (c, d) = value
        return (_whole(a), _whole(b)), (_whole(c), _whole(d))
    kind = type(getattr(BuildOptions(), name))
    if value is not None and kind in (bool, str) and not isinstance(value, kind):
        raise ValueError(f"{name} {value!r} is not a {kind.__name__}")
    return _whole(value) if name in ("optimization_level", "workspace_mib") and value is not None else value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value
