"""Number formats that each engine supports, and how it computes them.

                        ONNX Runtime, OpenVINO (CPU)    TensorRT-RTX, from compute capability
    int8                integers                        7.5
    w4a8                integers, from int4 in the file 7.5, from int8
    int8_weight_only    float, stored as integers       7.5
    int4                float, stored as integers       7.5
    fp8                 float, rounded as fp8: slower   8.9
    nvfp4               float, stored in 4 bits         12.0

A format that a CPU computes in float still samples, and its images can be checked; the manifest lists the format as
emulated. (For nvfp4 the CPU quantizes only the weights, so its images are better than the GPU's.) A target that cannot
run a format is rejected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffpress.compress.checkpoint import Quantization
from diffpress.export.targets.precision import computing_layers, layer_formats
from diffpress.runtime.errors import InvalidInputError


@dataclass(frozen=True)
class Support:
    """Support for one format.

    `on_gpu` is the minimum compute capability; `on_cpu` describes what engines on the CPU do if they do not compute in
    it.
    """

    on_gpu: tuple[int, int]
    on_cpu: str = ""


SUPPORT: dict[str, Support] = {
    "int8": Support((7, 5)),
    "w4a8": Support((7, 5)),
    "int8_weight_only": Support((7, 5)),
    "int4": Support((7, 5)),
    "fp8": Support((8, 9), "round to it"),
    "nvfp4": Support((12, 0), "read weights from 4 bits"),
}


def check_supported(formats: Iterable[str], capabilities: Sequence[str]) -> None:
    """Check that GPUs of these compute capabilities ('8.9') run all of the formats.

    Raises:
        InvalidInputError: If one does not.
    """
    for kind in sorted(set(formats)):
        for capability in capabilities:
            if _version(capability) < SUPPORT[kind].on_gpu:
                able = [other for other, support in SUPPORT.items() if support.on_gpu <= _version(capability)]
                least = ".".join(map(str, SUPPORT[kind].on_gpu))
                raise InvalidInputError(
                    f"target tensorrt: compute capability {capability} does not run format {kind}; {least} and later "
                    f"do, and {capability} runs {', '.join(able)}"
                )


def emulated(formats: Iterable[str]) -> list[str]:
    """Return those of the formats that engines on the CPU compute in float."""
    return sorted(kind for kind in set(formats) if SUPPORT[kind].on_cpu)


def emulation_note(formats: Iterable[str]) -> str:
    """Describe in one line how engines on the CPU emulate the formats; '' if they emulate none."""
    return "; ".join(
        f"{kind}: engines on the CPU {SUPPORT[kind].on_cpu} and compute in float, no faster than fp32; TensorRT "
        f"multiplies in it from compute capability {'.'.join(map(str, SUPPORT[kind].on_gpu))} on"
        for kind in emulated(formats)
    )


def expected_integer_layers(quantization: Quantization | None) -> list[str]:
    """Return the layers that engines on the CPU should run on integers."""
    formats = layer_formats(quantization)
    return [name for name in computing_layers(quantization) if not SUPPORT[formats[name]].on_cpu]


def _version(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)
