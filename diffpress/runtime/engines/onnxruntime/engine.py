"""ONNX Runtime engine: loads denoiser.onnx with all graph optimizations and runs any batch size.

It uses the first execution provider that works (see providers.py), which is the CPU in the default package. I/O binding
keeps the features of a step cache on the device; elsewhere it is not used: on the CPU it is no faster (alternating
medians, batch 1 and 8), and on other devices it was not measured.

The executed kernels are read from a profile of one run, not from the file: ONNX Runtime fuses Q/DQ pairs into
QLinearConv, QGemm etc. only if it has such a kernel, and runs the rest in float.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from diffpress.runtime.bundle import PrebuiltEngine
from diffpress.runtime.engines.onnxruntime.kernels import (
    CONVOLUTIONS,
    INTEGER,
    KERNEL,
    REWRITTEN,
    TRANSPOSED,
    Event,
    kernel_macs,
    kernel_name,
)
from diffpress.runtime.engines.onnxruntime.profiler import OnnxRuntimeProfiler, Recorder, tensor_owners
from diffpress.runtime.engines.onnxruntime.providers import CPU, PROVIDERS, provider_order
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.engines.precision_report import UNMATCHED, Kernel, PrecisionReport, Product, precision_report_of
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError
from diffpress.runtime.io.onnx_wire import read_nodes
from diffpress.runtime.lora.slots import lora_arrays

logger = logging.getLogger(__name__)

NAME = "onnxruntime"
EXTRA = None
OPTIONS = {"threads", "streams", "providers", "lean"}

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


def missing() -> str | None:
    """Return the package to install, or None if it is installed."""
    return None if importlib.util.find_spec("onnxruntime") else "onnxruntime"


def unusable() -> None:
    """Return None: ONNX Runtime works on any machine it can be installed on."""


def load(path: Path, options: EngineOptions, built: Sequence[PrebuiltEngine] = ()) -> OnnxRuntimeEngine:
    """Load an ONNX file; raises InvalidInputError if ONNX Runtime cannot read it."""
    return OnnxRuntimeEngine(path, options)


class OnnxRuntimeEngine:
    """Engine with one ONNX Runtime session; see diffpress.runtime.engines.Engine."""

    name = NAME

    def __init__(self, path: Path, options: EngineOptions) -> None:
        self._path, self._threads, self._lean = path, _threads(options), options.lean
        self._session, self.device = _first_session(path, self._own_options(), options.providers)
        nodes = {node.name: node for node in self._session.get_inputs()}
        self.lora = lora_arrays({name: node.shape for name, node in nodes.items()})
        self.inputs = {name: _numpy_type(node.type, path) for name, node in nodes.items() if name not in self.lora}
        self.outputs = [node.name for node in self._session.get_outputs()]

    def _own_options(self) -> Any:
        return _lean(self._threads) if self._lean else _options(self._threads)

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the first output for one batch."""
        return next(iter(self._run(self.outputs[:1], inputs).values()))

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return all outputs by name; raises InvalidInputError if ONNX Runtime fails."""
        return self._run(self.outputs, inputs)

    def _run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(outputs, self._session.run(outputs, {**inputs, **self.lora}), strict=True))
        except Exception as error:
            raise _error(self._path, "run", error) from error

    def run_keeping(
        self, inputs: dict[str, np.ndarray], kept: Sequence[str] = (), held: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the first output, and those of `kept` as OrtValues on the device; `held` are inputs of that form."""
        try:
            binding = self._session.io_binding()
            for name, array in {**inputs, **self.lora}.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            for name, value in held.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_output(self.outputs[0])
            for name in kept:
                binding.bind_output(name, "cuda" if self.device == "cuda" else "cpu")
            self._session.run_with_iobinding(binding)
            first, *others = binding.get_outputs()
            return first.numpy(), dict(zip(kept, others, strict=True))
        except Exception as error:
            raise _error(self._path, "run", error) from error

    def precision_report(
        self, example_inputs: dict[str, np.ndarray], quantized_layers: Collection[str] = ()
    ) -> PrecisionReport:
        """Report precision from one profiled run in a second session, which selects the same integer kernels."""
        nodes = {event["name"].removesuffix(KERNEL): event["args"] for event in self._inspected(example_inputs)}
        return precision_report_of([_product(name, node, nodes) for name, node in nodes.items()], quantized_layers)

    def kernel_times(self, example_inputs: dict[str, np.ndarray], runs: int = 3) -> list[Kernel]:
        """Time kernels in a profiled second session; NCHWc convolutions are named after their output tensor."""
        times: dict[str, list[float]] = {}
        for event in self._recorded(_options(self._threads), example_inputs, runs + 1):
            times.setdefault(event["name"], []).append(event["dur"] / 1e3)
        return [Kernel((kernel_name(name),), statistics.median(found[1:])) for name, found in times.items()]

    def profiler(self, example_inputs: dict[str, np.ndarray]) -> OnnxRuntimeProfiler:
        """Return a profiler of a second session.

        Raises:
            EngineUnavailableError: The kernels run on another device, where the profile times their launch only.
        """
        if self.device != CPU:
            raise EngineUnavailableError(
                f"{self._path}: on {self.device} ONNX Runtime's profiler times the launch of kernels, not the kernels; "
                "use --providers cpu"
            )
        return OnnxRuntimeProfiler(
            self._recorder(self._own_options()),
            {**example_inputs, **self.lora},
            self._inspected(example_inputs),
            tensor_owners(read_nodes(self._path)),
        )

    def _inspected(self, inputs: dict[str, np.ndarray]) -> list[Event]:
        """Return the kernel events of one run in a session that shows the shapes of all weights."""
        options = _options(self._threads)
        # prepacked weights are missing from the profile's shapes; kernel selection does not depend on prepacking
        options.add_session_config_entry("session.disable_prepacking", "1")
        # the NCHWc transform drops node names; it runs after integer kernels are selected
        return self._recorded(options, inputs, 1, without=["NchwcTransformer"])

    def _recorded(
        self, options: Any, inputs: dict[str, np.ndarray], runs: int, without: list[str] | None = None
    ) -> list[Event]:
        """Return the kernel events of a temporary session, in the order of execution."""
        recorder = self._recorder(options, without)
        for _ in range(runs):
            recorder.run({**inputs, **self.lora})
        return recorder.events()

    def _recorder(self, options: Any, without: list[str] | None = None) -> Recorder:
        return Recorder(lambda recording: _session(self._path, recording, self.device, without), options)

    def integer_mac_share(self, example_inputs: dict[str, np.ndarray]) -> float:
        """Return the integer MAC share of `precision_report`."""
        return self.precision_report(example_inputs).integer_mac_share

    def close(self) -> None:
        """Release the session."""
        self._session = None


def _options(threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # errors are raised as exceptions; do not also log them to stderr
    # weight-only int8 layers compute in float32; by default their inputs would be rounded to int8 as well
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def _lean(threads: int | None) -> Any:
    import onnxruntime

    options = _options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _threads(options: EngineOptions) -> int | None:
    """Threads per concurrent run: streams share the total, at least one each."""
    if options.streams == 1:
        return options.threads
    return max(1, (options.threads or os.cpu_count() or 1) // options.streams)


def _first_session(path: Path, options: Any, requested: Sequence[str]) -> tuple[Any, str]:
    """Return a session on the first provider that works and its name; warns about each provider that is skipped."""
    import onnxruntime

    names, unavailable = provider_order(requested, onnxruntime.get_available_providers())
    for name in unavailable:
        logger.warning(f"onnxruntime: this package has no provider '{name}'; trying {names[0]}")
    for name, following in itertools.pairwise(names):
        try:
            session, reason = _session(path, options, name), "it did not start"
            if PROVIDERS[name] in session.get_providers():  # ONNX Runtime drops some failing providers silently
                return session, name
        except InvalidInputError as error:
            reason = str(error)
        logger.warning(f"onnxruntime: provider '{name}' failed, trying {following}: {reason}")
    return _session(path, options, CPU), CPU


def _session(path: Path, options: Any, provider: str, without: list[str] | None = None) -> Any:
    import onnxruntime

    if not path.is_file():
        raise InvalidInputError(f"{path}: no such file")
    providers = [PROVIDERS[name] for name in dict.fromkeys([provider, CPU])]  # the CPU runs unsupported nodes
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=providers, disabled_optimizers=without, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        raise _error(path, "load", error) from error


def _error(path: Path, verb: str, error: Exception) -> InvalidInputError:
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return InvalidInputError(f"{path}: ONNX Runtime cannot {verb} it ({reason}); export it again")


def _numpy_type(name: str, path: Path) -> np.dtype:
    if name not in TYPES:
        raise InvalidInputError(f"{path}: an input of type {name} is not supported")
    return np.dtype(TYPES[name])


def _product(name: str, node: dict[str, Any], nodes: Collection[str]) -> Product:
    """Convert an executed kernel of `nodes` to a Product, with a reason if it ran in float."""
    kind, reason = node["op_name"], UNMATCHED
    if kind in TRANSPOSED:
        reason = "no integer kernel for transposed convolutions"
    elif kind in CONVOLUTIONS and f"{name}.output/Q" not in nodes:
        reason = "no integer convolution with a float result"
    return Product(REWRITTEN.sub("", name), kernel_macs(node), kind in INTEGER, reason)
