"""The two TensorRT libraries, which share most of their API, and the local GPU.

    tensorrt-rtx    `import tensorrt_rtx`    builds for any GPU without needing one; compiles kernels on first run
    tensorrt        `import tensorrt`        builds on the local GPU for that GPU

An engine runs only in the library and version that built it. Importing this module does not access a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffpress.runtime.errors import EngineUnavailableError, MissingDependencyError

RTX, CLASSIC = "tensorrt-rtx", "tensorrt"
MODULES = {RTX: "tensorrt_rtx", CLASSIC: "tensorrt"}
CUDA, CUDA_PACKAGE = "cuda.bindings", "cuda-python"
EXTRA = "tensorrt"


@dataclass(frozen=True)
class Device:
    """What an engine must match: the GPU's compute capability ('8.9') and the versions of the installed libraries."""

    capability: str
    libraries: Mapping[str, str]


def installed() -> list[str]:
    """List the installed libraries, TensorRT-RTX first."""
    return [library for library, module in MODULES.items() if _present(module)]


def cuda_missing() -> bool:
    """Return whether cuda-python, which copies data and launches kernels, is missing."""
    return not _present(CUDA)


def library(name: str) -> Any:
    """Import one of the two libraries; raises MissingDependencyError if it is not installed."""
    if not _present(MODULES[name]):
        raise MissingDependencyError(name, EXTRA, "TensorRT")
    return importlib.import_module(MODULES[name])


def cuda_runtime() -> Any:
    """Import cuda.bindings.runtime; raises MissingDependencyError if it is not installed."""
    if cuda_missing():
        raise MissingDependencyError(CUDA_PACKAGE, EXTRA, "TensorRT")
    return importlib.import_module("cuda.bindings.runtime")


def call(cuda: Any, name: str, *args: Any) -> Any:
    """Call a function of the CUDA runtime or driver and return its result, a tuple if there are several.

    Raises:
        EngineUnavailableError: The call failed; the message contains CUDA's error string.
    """
    error, *found = getattr(cuda, name)(*args)
    if int(error) != 0:
        message = cuda.cudaGetErrorString(error)[1]
        raise EngineUnavailableError(
            f"CUDA: {name} failed: {message.decode() if isinstance(message, bytes) else message}"
        )
    return found[0] if len(found) == 1 else tuple(found)


def gpu_capability(cuda: Any) -> str:
    """Return the first GPU's compute capability, e.g. '8.9'; raises EngineUnavailableError if there is none."""
    try:
        count = call(cuda, "cudaGetDeviceCount")
    except EngineUnavailableError as error:
        raise EngineUnavailableError(f"no usable NVIDIA GPU ({error})") from error
    if count == 0:
        raise EngineUnavailableError("no NVIDIA GPU found")
    attributes = cuda.cudaDeviceAttr
    major = call(cuda, "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
    minor = call(cuda, "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
    return f"{major}.{minor}"


def device_here() -> Device:
    """Return the GPU and the libraries of this machine.

    Raises:
        MissingDependencyError: cuda-python is not installed.
        EngineUnavailableError: There is no usable GPU.
    """
    capability = gpu_capability(cuda_runtime())
    return Device(capability, {name: str(library(name).__version__) for name in installed()})


def targets(trt: Any) -> dict[str, Any]:
    """Map the compute capabilities the library can cross-compile for, e.g. '8.9', to its enum values."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}


def collector(trt: Any) -> Any:
    """Create a TensorRT logger that collects error messages in `errors` instead of printing them."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Collector()


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
