"""OpenVINO engine on the CPU: reads denoiser.onnx (or an IR) and compiles it for each input shape.

Compiling for fixed shapes takes a second or two per batch size and speeds up every step: on the default teacher a step
took 0.70x of the dynamic graph's time, in fp32 and in int8 (alternating medians, 2 cores, AVX2). The last few compiled
shapes stay in memory; with a cache they persist between processes, and a cached model is loaded without reading the
graph.

Precision is pinned to fp32 unless bf16 or fp16 is requested, so a float graph stays float32 on CPUs with bf16; the Q/DQ
parts of a quantized graph run on integers. Weight-only quantized layers keep float inputs: by default OpenVINO would
round them to int8 in groups of 32 on CPUs with AVX512-VNNI. Rewrites of a graph after it is read: signed_integers.py,
residual_sums.py, timestep_embedding.py.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from diffpress.runtime.bundle import PrebuiltEngine
from diffpress.runtime.engines.openvino.layers import layer_names, products
from diffpress.runtime.engines.openvino.profiler import OpenVinoProfiler
from diffpress.runtime.engines.openvino.residual_sums import keep_residual_sums_float_
from diffpress.runtime.engines.openvino.signed_integers import use_signed_integers_
from diffpress.runtime.engines.openvino.timestep_embedding import keep_timestep_embedding_float_
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.engines.precision_report import Kernel, PrecisionReport, precision_report_of
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError
from diffpress.runtime.lora.slots import lora_arrays

EXTRA = "openvino"
OPTIONS = {"threads", "precision", "streams"}
KEPT_SHAPES = 4
REWRITES_VERSION = 2  # of the graph after it is read, part of the cache key: increment it with every change
NO_SNIPPETS = {"SNIPPETS_MODE": "DISABLE"}

CAPABILITIES = {"bf16": "BF16", "fp16": "FP16"}
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # OpenVINO's names

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def missing() -> str | None:
    """Return the package to install, or None if it is installed."""
    return None if importlib.util.find_spec("openvino") else "openvino"


def unusable() -> None:
    """Return None: OpenVINO works on any machine it can be installed on."""


def load(path: Path, options: EngineOptions, built: Sequence[PrebuiltEngine] = ()) -> OpenVinoEngine:
    """Load an ONNX file or an IR.

    Raises:
        InvalidInputError: OpenVINO cannot read the file.
        EngineUnavailableError: The CPU does not support the requested precision.
    """
    return OpenVinoEngine(path, options)


class Variant(NamedTuple):
    """A changed graph that an engine compiles besides its own.

    Attributes:
        key: Identifies the change, as a part of the cache key.
        change: Takes the openvino.Model with fixed shapes and returns a changed copy.
        request: Takes the compiled model and returns the object that runs it, one per stream.
    """

    key: tuple[int, ...]
    change: Callable[[Any], Any]
    request: Callable[[Any], Any]


UNCHANGED = Variant((), lambda model: model, lambda compiled: compiled.create_infer_request())


class OpenVinoEngine:
    """Engine with one model compiled per input shape; see diffpress.runtime.engines.Engine.

    Attributes:
        inputs: Inputs of the graph: name -> dtype.
        lora: Inputs of the graph's slots for LoRAs, which requests read in place.
        precision: The precision it was opened with: fp32, bf16 or fp16.
        graph_bytes: Size of the graph, including its weights.
    """

    name, device = "openvino", "cpu"

    def __init__(self, path: Path, options: EngineOptions) -> None:
        import openvino

        if not path.is_file():
            raise InvalidInputError(f"{path}: no such file")
        self._path, self._core, self._cache = path, openvino.Core(), options.cache
        self._streams, self._options = options.streams, _properties(self._core, options)
        self.precision, self.graph_bytes = options.precision, _size(path)
        self._model: Any = None
        self._compiled: dict[tuple[Shapes, tuple[int, ...]], _Compiled] = {}
        self._compiling = Lock()
        tensors = self._tensors()
        self.lora = lora_arrays(tensors.get("shapes", {}))
        self.inputs = {name: np.dtype(kind) for name, kind in tensors["inputs"].items() if name not in self.lora}
        self.outputs: list[str] = tensors["outputs"]

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the first output for one batch."""
        return self.run_keeping(inputs)[0]

    def run_keeping(
        self, inputs: dict[str, np.ndarray], kept: Sequence[str] = (), held: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the first output, and those of `kept` as OpenVINO's tensors; `held` are inputs of that form."""
        import openvino

        shapes = (*tensor_shapes(inputs), *((name, tuple(tensor.shape)) for name, tensor in held.items()))
        with self.reserved(shapes) as request:
            ports = {name: self.outputs.index(name) for name in kept}
            own = {name: request.get_output_tensor(port) for name, port in ports.items()}
            found = {name: openvino.Tensor(own[name].element_type, own[name].shape) for name in kept}
            try:
                for name, port in ports.items():  # in memory of its own: the next inference overwrites the request's
                    request.set_output_tensor(port, found[name])
                outputs = request.infer({**inputs, **held}, share_inputs=True, share_outputs=True)
                first: np.ndarray = outputs.to_tuple()[0].copy()
            finally:
                for name, port in ports.items():
                    request.set_output_tensor(port, own[name])
            return first, found

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return all outputs by name; raises InvalidInputError if OpenVINO fails."""
        with self.reserved(tensor_shapes(inputs)) as request:
            # copies: with `share_outputs` the next inference would overwrite them
            outputs = request.infer(inputs, share_inputs=True).to_tuple()
            own = outputs[: len(self.outputs)]  # timestep_embedding.py appends others
            return dict(zip(self.outputs, own, strict=True))

    @contextmanager
    def reserved(self, shapes: Shapes, variant: Variant = UNCHANGED) -> Iterator[Any]:
        """Reserve an idle request of the graph, or of a variant of it, compiled for these shapes.

        Errors inside the block become InvalidInputError.
        """
        requests = self._compiled_for(shapes, variant).requests
        request = requests.get()
        try:
            yield request
        except Exception as error:
            raise _error(self._path, "run", error) from error
        finally:
            requests.put(request)

    def precision_report(
        self, example_inputs: dict[str, np.ndarray], quantized_layers: Collection[str] = ()
    ) -> PrecisionReport:
        """Report precision from the layers of the model compiled for these shapes."""
        compiled = self._compiled_for(tensor_shapes(example_inputs)).model
        with self._compiling:  # the model is reshaped in place for each compilation
            return precision_report_of(
                list(products(self._reshaped(tensor_shapes(example_inputs)), compiled)), quantized_layers
            )

    def profiler(self, example_inputs: dict[str, np.ndarray]) -> OpenVinoProfiler:
        """Return a profiler of a second compiled model with performance counters."""
        return self._profiler_of(*self._counted(example_inputs), example_inputs)

    def _profiler_of(self, model: Any, compiled: Any, inputs: dict[str, np.ndarray]) -> OpenVinoProfiler:
        return OpenVinoProfiler(model, compiled, {**inputs, **self.lora})

    def kernel_times(self, example_inputs: dict[str, np.ndarray], runs: int = 3) -> list[Kernel]:
        """Time kernels with performance counters; they only report averages, so this is the mean of the runs."""
        model, compiled = self._counted(example_inputs)
        names, profiler = layer_names(compiled), self._profiler_of(model, compiled, example_inputs)
        for _ in range(runs + 1):
            profiler.run()
        return [Kernel(names.get(name, (name,)), ms) for name, ms in profiler.kernel_ms().items()]

    def integer_mac_share(self, example_inputs: dict[str, np.ndarray]) -> float:
        """Return the integer MAC share of `precision_report`."""
        return self.precision_report(example_inputs).integer_mac_share

    def close(self) -> None:
        """Release the model and its compiled forms."""
        self._compiled.clear()
        self._model = self._core = None

    def _compiled_for(self, shapes: Shapes, variant: Variant = UNCHANGED) -> _Compiled:
        compiled = self._compiled.get((shapes, variant.key))
        if compiled is None:
            with self._compiling:
                compiled = self._compiled.get((shapes, variant.key)) or self._compile(shapes, variant)
        return compiled

    def _compile(self, shapes: Shapes, variant: Variant) -> _Compiled:
        if len(self._compiled) == KEPT_SHAPES:
            del self._compiled[next(iter(self._compiled))]
        key = self._key(shapes, variant.key)
        try:
            model = self._import(key)
            if model is None:
                model = self._compile_model(variant.change(self._reshaped(shapes)), self._options)
                if self._cache is not None:
                    self._cache.write(key, _exported(model))
        except InvalidInputError:
            raise
        except Exception as error:
            raise _error(self._path, "compile", error) from error
        compiled = _Compiled(model, SimpleQueue())
        for _ in range(self._streams):
            request = variant.request(model)
            if variant is UNCHANGED:
                self._bind_lora_(request)
            compiled.requests.put(request)
        # only now, since a thread that finds a model without requests waits for ever
        self._compiled[shapes, variant.key] = compiled
        return compiled

    def _counted(self, inputs: dict[str, np.ndarray]) -> tuple[Any, Any]:
        """Return the model at the shapes of these inputs, and compiled with performance counters."""
        with self._compiling:  # the model is reshaped in place for each compilation
            model = self._reshaped(tensor_shapes(inputs)).clone()
        return model, self._compile_model(model, self._options | {"PERF_COUNT": True})

    def _bind_lora_(self, request: Any) -> None:
        """Let an inference request read the arrays of the LoRA slots, which may change between its runs."""
        import openvino

        for name, array in self.lora.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def _compile_model(self, model: Any, options: dict[str, Any]) -> Any:
        if self.precision == "bf16":
            keep_timestep_embedding_float_(model)
        try:
            return self._core.compile_model(model, "CPU", options)
        except Exception:
            # OpenVINO 2026.4 generates kernels ("snippets") for operators that it cannot generate, e.g. Mish between
            # linear layers
            return self._core.compile_model(model, "CPU", options | NO_SNIPPETS)

    def _import(self, key: str) -> Any:
        """Import the compiled model from the cache; None if it is missing or OpenVINO rejects it."""
        stored = None if self._cache is None else self._cache.read(key)
        if stored is None:
            return None
        try:
            return self._core.import_model(stored, "CPU", self._options)
        except Exception:  # it is compiled again
            return None

    def _tensors(self) -> dict[str, Any]:
        """Return {"inputs": name -> dtype name, "outputs": names}, from the cache if possible."""
        stored = None if self._cache is None else self._cache.read(self._key(()))
        if stored is not None:
            return dict(json.loads(stored))
        model = self._read()
        try:
            kinds = {node.get_any_name(): np.dtype(node.get_element_type().to_dtype()).name for node in model.inputs}
            tensors = {"inputs": kinds, "outputs": [node.get_any_name() for node in model.outputs]}
            shapes = {node.get_any_name(): node.get_partial_shape() for node in model.inputs}
            # dynamic shapes are not those of slots
            tensors["shapes"] = {name: list(shape.to_shape()) for name, shape in shapes.items() if shape.is_static}
        except Exception as error:  # an unnamed tensor, or a type without a numpy equivalent
            raise _error(self._path, "load", error) from error
        if self._cache is not None:
            self._cache.write(self._key(()), json.dumps(tensors).encode())
        return tensors

    def _key(self, shapes: Shapes, variant: tuple[int, ...] = ()) -> str:
        """Cache key: everything a compiled model depends on besides the graph."""
        version, device = self._core.get_versions("CPU")["CPU"].build_number, "FULL_DEVICE_NAME"
        return json.dumps(
            [version, self._core.get_property("CPU", device), self._options, REWRITES_VERSION, shapes, *variant]
        )

    def _read(self) -> Any:
        if self._model is None:
            _check_format(self._path)
            try:
                model = self._core.read_model(self._path)
                use_signed_integers_(model)
                keep_residual_sums_float_(model)
                self._model = model
            except Exception as error:
                raise _error(self._path, "load", error) from error
        return self._model

    def _reshaped(self, shapes: Shapes) -> Any:
        model = self._read()
        model.reshape(dict(shapes))
        return model


class _Compiled(NamedTuple):
    """A model compiled for fixed shapes, and its idle requests, one per stream."""

    model: Any
    requests: SimpleQueue[Any]


def _properties(core: Any, options: EngineOptions) -> dict[str, Any]:
    """Convert options to OpenVINO properties; raises EngineUnavailableError for an unsupported precision."""
    capability = CAPABILITIES.get(options.precision)
    if capability is not None and capability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        device = core.get_property("CPU", "FULL_DEVICE_NAME")
        raise EngineUnavailableError(
            f"engine 'openvino': this CPU ({device}) does not support precision {options.precision}; use fp32"
        )
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[options.precision]}
    properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    if options.streams > 1:
        properties |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": options.streams}
    if options.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = options.threads
    return properties


def _check_format(path: Path) -> None:
    """Refuse an ONNX file that is none: OpenVINO would try to read it in the formats of other frameworks."""
    from openvino.frontend import FrontEndManager

    if path.suffix == ".onnx" and not FrontEndManager().load_by_framework("onnx").supported(str(path)):
        raise InvalidInputError(f"{path}: OpenVINO cannot load it (not an ONNX model); export it again")


def _size(path: Path) -> int:
    """Size of a graph in bytes, including its external weights."""
    weights = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def tensor_shapes(inputs: dict[str, np.ndarray]) -> Shapes:
    """Return the (name, shape) pairs of the inputs."""
    return tuple((name, array.shape) for name, array in inputs.items())


def _exported(model: Any) -> memoryview:
    stream = io.BytesIO()
    model.export_model(stream)
    return stream.getbuffer()


def _error(path: Path, verb: str, error: Exception) -> InvalidInputError:
    """Convert a multi-line OpenVINO error: its last line is the reason, the others are source locations."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
    advice = "export it again" if verb == "load" else "use another engine"
    return InvalidInputError(f"{path}: OpenVINO cannot {verb} it ({(lines or ['no reason given'])[-1]}); {advice}")
