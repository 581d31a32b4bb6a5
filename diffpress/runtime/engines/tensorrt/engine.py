"""TensorRT backend for NVIDIA GPUs: runs a prebuilt engine, or builds one from the ONNX graph (--rebuild).

An engine is used only if it is compatible (compatibility.py): library, version, GPU, graph and the file's sha256 are
checked before anything is deserialized. Rebuilt engines are stored in the user's cache. Batches above the engine's
maximum are split.

TensorRT does not report which kernels compute on integers, so there is no precision report.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from diffpress.runtime.bundle import PrebuiltEngine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.engines.precision_report import Kernel, PrecisionReport
from diffpress.runtime.engines.tensorrt import library as libraries
from diffpress.runtime.engines.tensorrt.binding import Binding
from diffpress.runtime.engines.tensorrt.compatibility import uncovered
from diffpress.runtime.engines.tensorrt.engine_files import engine_for
from diffpress.runtime.engines.tensorrt.messages import one_line
from diffpress.runtime.errors import EngineUnavailableError

NAME = "tensorrt"
EXTRA = libraries.EXTRA
OPTIONS = {"threads", "rebuild"}
KEPT_SHAPES = 4

TYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool", "UINT8": "uint8"}

Inputs = dict[str, np.ndarray]


def missing() -> str | None:
    """Return the package to install, or None if all are installed."""
    if not libraries.installed():
        return libraries.RTX
    return libraries.CUDA_PACKAGE if libraries.cuda_missing() else None


def unusable() -> str | None:
    """Return why this machine cannot run TensorRT (no GPU), or None."""
    try:
        libraries.gpu_capability(libraries.cuda_runtime())
    except EngineUnavailableError as error:
        return str(error)
    return None


def load(path: Path, options: EngineOptions, built: Sequence[PrebuiltEngine] = ()) -> TensorRtEngine:
    """Load the engine of this graph that fits this machine, or build one with `options.rebuild`.

    Raises:
        EngineUnavailableError: No engine fits this machine and none is to be built.
    """
    data, entry = engine_for(path, options, built, libraries.device_here())
    return TensorRtEngine(path, data, entry, options)


class TensorRtEngine:
    """A deserialized engine and its bindings per input shape; see diffpress.runtime.engines.Engine.

    Attributes:
        inputs: Inputs of the graph: name -> dtype.
        outputs: Outputs of the graph: name -> dtype.
        largest_batch: The largest batch of one binding.
        cuda: The module cuda.bindings.runtime.
        stream: CUDA stream of all copies and kernels.
    """

    name, device = NAME, "cuda"

    def __init__(self, path: Path, data: bytes, entry: dict[str, Any], options: EngineOptions) -> None:
        self._path, self._profile = path, entry["profile"]
        self.largest_batch = min(high[0] for _, _, high in self._profile.values())
        self.cuda, self._trt = libraries.cuda_runtime(), libraries.library(entry["library"])
        self._logger = libraries.collector(self._trt)
        self._runtime = self._trt.Runtime(self._logger)
        if options.threads is not None:
            self._runtime.max_threads = options.threads  # threads that load and compile
        self._engine = self._deserialized(data, entry["options"])
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._types = {name: self._type(name) for name in names}
        is_input = self._trt.TensorIOMode.INPUT
        self.inputs = {n: self._types[n] for n in names if self._engine.get_tensor_mode(n) == is_input}
        self.outputs = {name: kind for name, kind in self._types.items() if name not in self.inputs}
        self.stream = libraries.call(self.cuda, "cudaStreamCreateWithFlags", self.cuda.cudaStreamNonBlocking)
        self._bindings: dict[tuple[tuple[str, tuple[int, ...]], ...], Binding] = {}
        self._cache, self._compiled = options.cache, f"kernels of {entry['sha256']}"
        self._config = self._runtime_config()

    def run(self, inputs: Inputs) -> np.ndarray:
        """Return the first output for one batch."""
        return next(iter(self.run_all(inputs).values()))

    def run_all(self, inputs: Inputs) -> Inputs:
        """Return all outputs by name; batches above the engine's maximum are split."""
        chunks = [self.binding(chunk).run(chunk) for chunk in split_batch(inputs, self.largest_batch)]
        return chunks[0] if len(chunks) == 1 else {n: np.concatenate([chunk[n] for chunk in chunks]) for n in chunks[0]}

    def binding(self, inputs: Inputs) -> Binding:
        """Return the binding for inputs of these shapes; the last few stay open.

        Raises:
            EngineUnavailableError: The shapes are outside the engine's profile.
        """
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        key = tuple(sorted(shapes.items()))
        if key not in self._bindings:
            reason = uncovered(self._profile, shapes)
            if reason is not None:
                raise EngineUnavailableError(
                    f"{self._path.name}: input outside the TensorRT engine's profile: {reason}; export with --sizes"
                )
            if len(self._bindings) == KEPT_SHAPES:
                self._drop(next(iter(self._bindings)))
            self._bindings[key] = self._bound(inputs)
        return self._bindings[key]

    def precision_report(self, example_inputs: Inputs, quantized_layers: Collection[str] = ()) -> PrecisionReport:
        """Raise EngineUnavailableError: TensorRT does not report the precision of its kernels."""
        raise EngineUnavailableError(f"{self._path}: TensorRT does not report which of its kernels compute on integers")

    def integer_mac_share(self, example_inputs: Inputs) -> None:
        """Return None: TensorRT does not report the precision of its kernels."""

    def kernel_times(self, example_inputs: Inputs, runs: int = 3) -> list[Kernel]:
        """Time TensorRT's layers with its profiler; each layer may fuse several nodes."""
        times: dict[str, list[float]] = {}

        class Profiler(self._trt.IProfiler):  # type: ignore[misc, name-defined]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(ms)

        profiler = Profiler()
        binding = self._bound(example_inputs, profiler)
        try:
            for _ in range(runs + 1):
                binding.run(example_inputs)
        finally:
            binding.close()
        return [Kernel((name,), statistics.median(found[1:])) for name, found in times.items()]

    def profiler(self, example_inputs: Inputs) -> NoReturn:
        """Raise EngineUnavailableError: TensorRT times its layers, and does not report what they compute."""
        raise EngineUnavailableError(
            f"{self._path}: TensorRT times its layers, but an engine does not report their products, bytes and "
            "precision; profile it in another engine"
        )

    def close(self) -> None:
        """Release bindings, stream and engine."""
        for key in list(self._bindings):
            self._drop(key)
        if self.stream is not None:
            libraries.call(self.cuda, "cudaStreamDestroy", self.stream)
        self.stream = self._config = self._engine = self._runtime = None

    def _bound(self, inputs: Inputs, profiler: Any = None) -> Binding:
        make = self._engine.create_execution_context
        context = make() if self._config is None else make(runtime_config=self._config)
        if context is None:
            raise self._error("create an execution context")
        if profiler is not None:
            context.profiler = profiler
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        return Binding(self.cuda, context, self.stream, shapes, self._types, replay=profiler is None)

    def _drop(self, key: Any) -> None:
        self._bindings.pop(key).close()
        self._store_compiled()

    def _deserialized(self, data: bytes, options: dict[str, Any]) -> Any:
        if hasattr(self._runtime, "get_engine_validity"):  # TensorRT-RTX: reads only the header
            validity, flags = self._runtime.get_engine_validity(data[: self._runtime.engine_header_size])
            if validity == self._trt.EngineValidity.INVALID:
                raise self._error("use the engine on this machine", reasons(self._trt, flags))
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._error("read the engine")
        if options.get("strip_weights"):
            refitter = self._trt.OnnxParserRefitter(self._trt.Refitter(engine, self._logger), self._logger)
            if not refitter.refit_from_file(str(self._path)):
                raise self._error("refit the engine with the weights of the graph")
        if options.get("stream_weights"):
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    def _runtime_config(self) -> Any:
        """Create the runtime config with the kernels compiled by earlier runs (TensorRT-RTX only, else None)."""
        if not hasattr(self._trt, "IRuntimeCache"):
            return None
        config = self._engine.create_runtime_config()
        kernels = config.create_runtime_cache()
        compiled = None if self._cache is None else self._cache.read(self._compiled)
        if compiled is not None:
            kernels.deserialize(compiled)  # stays empty if the GPU or driver differs
        config.set_runtime_cache(kernels)
        return config

    def _store_compiled(self) -> None:
        if self._config is not None and self._cache is not None:
            self._cache.write(self._compiled, bytes(self._config.get_runtime_cache().serialize()))

    def _type(self, name: str) -> np.dtype:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in TYPES:
            raise EngineUnavailableError(
                f"{self._path}: '{name}' has type {kind}, which numpy does not support; export it with float inputs"
            )
        return np.dtype(TYPES[kind])

    def _error(self, verb: str, known: str = "") -> EngineUnavailableError:
        reason = known or one_line(self._logger.errors[0] if self._logger.errors else "")
        return EngineUnavailableError(f"{self._path}: TensorRT cannot {verb} ({reason}); build another with --rebuild")


def reasons(trt: Any, flags: int) -> str:
    """Decode TensorRT-RTX's diagnostics of an invalid engine to text, e.g. 'version mismatch, unsupported cc'."""
    members = trt.EngineInvalidityDiagnostics.__members__.items()
    return ", ".join(name.lower().replace("_", " ") for name, flag in members if int(flags) & int(flag))


def split_batch(inputs: Inputs, largest: int) -> Iterator[Inputs]:
    """Yield the batch in order, in chunks of at most `largest` samples."""
    count = max(len(array) for array in inputs.values())
    for start in range(0, count, largest):
        yield {name: array[start : start + largest] for name, array in inputs.items()}
