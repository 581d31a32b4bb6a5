"""TensorRT as it comes in two libraries with nearly one API, and the GPU it would run on.

    tensorrt-rtx    `import tensorrt_rtx`    builds for any GPU, without one; compiled for it when it first runs
    tensorrt        `import tensorrt`        builds for the GPU that is here, on it

A plan runs in the library that built it, in that version alone. Nothing here touches a GPU before it is asked to.
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
    """What a plan must fit: the GPU's compute capability ('8.9'), and the version of each library installed."""

    capability: str
    libraries: Mapping[str, str]


def installed() -> list[str]:
    """The libraries that are installed, TensorRT-RTX first."""
    return [library for library, module in MODULES.items() if _present(module)]


def cuda_missing() -> bool:
    """Whether cuda-python, which moves the data and launches, is absent."""
    return not _present(CUDA)


def library(name: str) -> Any:
    """The module of one of the two; raises MissingDependencyError where it is not installed."""
    if not _present(MODULES[name]):
        raise MissingDependencyError(name, EXTRA, "TensorRT")
    return importlib.import_module(MODULES[name])


def cuda_runtime() -> Any:
    """cuda.bindings.runtime; raises MissingDependencyError where it is not installed."""
    if cuda_missing():
        raise MissingDependencyError(CUDA_PACKAGE, EXTRA, "TensorRT")
    return importlib.import_module("cuda.bindings.runtime")


def call(cuda: Any, name: str, *args: Any) -> Any:
    """One function of the CUDA runtime; its result (a tuple of several). Raises Unfit with what CUDA says."""
    error, *found = getattr(cuda, name)(*args)
    if int(error) != 0:
        said = cuda.cudaGetErrorString(error)[1]
        raise EngineUnavailableError(f"CUDA: {name} failed: {said.decode() if isinstance(said, bytes) else said}")
    return found[0] if len(found) == 1 else tuple(found)


def gpu_capability(cuda: Any) -> str:
    """'8.9' of the first GPU; raises Unfit in one line where there is none."""
    try:
        count = call(cuda, "cudaGetDeviceCount")
    except EngineUnavailableError as error:
        raise EngineUnavailableError(f"there is no NVIDIA GPU that can be used ({error})") from error
    if count == 0:
        raise EngineUnavailableError("there is no NVIDIA GPU")
    attributes = cuda.cudaDeviceAttr
    major = call(cuda, "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
    minor = call(cuda, "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
    return f"{major}.{minor}"


def device_here() -> Device:
    """The facts of this machine; raises MissingDependencyError and Unfit as its parts do."""
    capability = gpu_capability(cuda_runtime())
    return Device(capability, {name: str(library(name).__version__) for name in installed()})


def targets(trt: Any) -> dict[str, Any]:
    """'8.9' -> what stands for it, of all compute capabilities that this library can build for without the GPU."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}


def collector(trt: Any) -> Any:
    """A logger that keeps what the library says as errors, in place of printing it; see `reason`."""

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
    except ModuleNotFoundError:  # its parent is not there
        return False
