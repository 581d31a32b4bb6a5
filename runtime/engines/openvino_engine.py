"""OpenVINO on the CPU: reads denoiser.onnx (or an IR), compiles it for the very shapes it is asked to run.

Compiling for fixed shapes costs a second or two per batch size and pays at every step: on the default teacher
a step took 0.70x of the dynamic graph's time, in fp32 and in int8 (medians in alternation, 2 cores, AVX2).
The last few batch sizes are kept. Precision is pinned to f32, so a float graph stays float on processors with
bf16; the Q/DQ parts of a quantized graph run on integers, and which ones did is read from the compiled model.
"""

from __future__ import annotations

import importlib.util
import re
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engines import macs
from runtime.engines.account import UNMATCHED, Account, Kernel, Product, accounted
from runtime.errors import BadInput

EXTRA = "openvino"
KEPT_SHAPES = 4

CONVOLUTIONS = {"Convolution", "GroupConvolution"}
TRANSPOSED = {"ConvolutionBackpropData", "GroupConvolutionBackpropData"}
INTEGERS = {"i8", "u8"}

# types of executed layers
KERNELS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention"}
SUBGRAPH = "Subgraph"
# what its transformations put behind the name of an operation
RESCALED = "/DequantizationMultiply"
WITHOUT_BIAS = "/WithoutBiases"


def missing() -> str | None:
    return None if importlib.util.find_spec("openvino") else "openvino"


def load(path: Path, *, threads: int | None = None) -> OpenVinoEngine:
    """Read an ONNX file or an IR, to run on `threads` cores (None: all); BadInput where OpenVINO cannot."""
    return OpenVinoEngine(path, threads)


class OpenVinoEngine:
    """One model and its compiled forms by input shape; see runtime.engines.Engine."""

    name = "openvino"

    def __init__(self, path: Path, threads: int | None) -> None:
        import openvino

        if not path.is_file():
            raise BadInput(f"{path}: no such file")
        self._path, self._core = path, openvino.Core()
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = self._core.read_model(path)
        except Exception as error:
            raise _refused(path, "load", error) from error
        self.inputs = {node.get_any_name(): np.dtype(node.get_element_type().to_dtype()) for node in self._model.inputs}
        self._outputs = [node.get_any_name() for node in self._model.outputs]
        self._requests: dict[tuple[tuple[str, tuple[int, ...]], ...], Any] = {}

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return next(iter(self.run_all(inputs).values()))

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        request = self._request(inputs)
        try:
            request.infer(inputs, share_inputs=True)
        except Exception as error:
            raise _refused(self._path, "run", error) from error
        # copies: the request's own outputs are overwritten by the next call
        return {name: request.get_output_tensor(i).data.copy() for i, name in enumerate(self._outputs)}

    def account(self, example_inputs: dict[str, np.ndarray], promised: Collection[str] = ()) -> Account:
        """From the layers of the model compiled for these shapes; products inside a subgraph run in float."""
        layers = self._request(example_inputs).get_compiled_model().get_runtime_model().get_ops()
        # the model as read keeps the shapes of whatever was compiled last
        self._model.reshape({name: array.shape for name, array in example_inputs.items()})
        ran: dict[str, tuple[bool, str]] = {}  # operation -> whether on integers, else why not
        for layer in sorted(layers, key=_is_integer):  # an operation that is in several is where the integers are
            reason = "fused into a float subgraph" if _info(layer, "layerType") == SUBGRAPH else UNMATCHED
            for name in _info(layer, "originalLayersNames").split(","):
                ran[name.removesuffix(RESCALED)] = _is_integer(layer), reason
        products = []
        for operation in self._model.get_ops():
            integer, reason = ran.get(operation.get_friendly_name(), (False, UNMATCHED))
            products.append(Product(_named(operation), _operation_macs(operation), integer, reason))
        return accounted(products, promised)

    def kernel_times(self, example_inputs: dict[str, np.ndarray], runs: int = 3) -> list[Kernel]:
        """From the performance counters of a second compiled model."""
        self._model.reshape({name: array.shape for name, array in example_inputs.items()})
        compiled = self._core.compile_model(self._model, "CPU", self._options | {"PERF_COUNT": True})
        names = {
            layer.get_friendly_name(): [layer.get_friendly_name(), *_info(layer, "originalLayersNames").split(",")]
            for layer in compiled.get_runtime_model().get_ops()
        }
        request, times = compiled.create_infer_request(), dict[str, list[float]]()
        for _ in range(runs + 1):
            request.infer(example_inputs, share_inputs=True)
            for entry in request.profiling_info:
                times.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1e3)
        return [
            Kernel(_plain(names.get(name, [name])), statistics.median(found[1:])) for name, found in times.items()
        ]

    def integer_mac_share(self, example_inputs: dict[str, np.ndarray]) -> float:
        return self.account(example_inputs).integer_mac_share

    def close(self) -> None:
        self._requests.clear()
        self._model = self._core = None

    def _request(self, inputs: dict[str, np.ndarray]) -> Any:
        """The infer request for these shapes, compiled on first sight."""
        shapes = tuple((name, array.shape) for name, array in inputs.items())
        if shapes not in self._requests:
            if len(self._requests) == KEPT_SHAPES:
                del self._requests[next(iter(self._requests))]
            try:
                self._model.reshape(dict(shapes))
                compiled = self._core.compile_model(self._model, "CPU", self._options)
            except Exception as error:
                raise _refused(self._path, "compile", error) from error
            self._requests[shapes] = compiled.create_infer_request()
        return self._requests[shapes]


def _refused(path: Path, verb: str, error: Exception) -> BadInput:
    """One line out of OpenVINO's many: the last is the reason, those before say where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
    return BadInput(f"{path}: OpenVINO cannot {verb} it ({(lines or ['no reason given'])[-1]}); export it again")


def _operation_macs(operation: Any) -> int:
    """Multiply-accumulates of one operation of the graph as read, at the shapes it was last reshaped to."""
    kind = operation.get_type_name()
    if kind in CONVOLUTIONS:
        return macs.convolution(_out(operation), _in(operation, 1))
    if kind in TRANSPOSED:
        return macs.transposed_convolution(_in(operation, 0), _in(operation, 1))
    if kind == "MatMul":
        return macs.product(_in(operation, 0), _out(operation))
    if kind == "ScaledDotProductAttention":
        return macs.attention(_in(operation, 0), _in(operation, 1), _in(operation, 2))
    return 0


def _is_integer(layer: Any) -> bool:
    return _info(layer, "layerType") in KERNELS and _info(layer, "runtimePrecision") in INTEGERS


def _named(operation: Any) -> str:
    """Its ONNX node's name; where OpenVINO gave that to the addition of the bias, and it a number, the addition's.

    Lost for a product that is itself an output of the graph, which has the output's name.
    """
    name = str(operation.get_friendly_name()).removesuffix(WITHOUT_BIAS)
    if not re.fullmatch(rf"{operation.get_type_name()}_\d+", name):
        return name
    readers = [target.get_node() for target in operation.output(0).get_target_inputs()]
    return next((str(node.get_friendly_name()) for node in readers if node.get_type_name() == "Add"), name)


def _plain(names: list[str]) -> tuple[str, ...]:
    """Each of the names once, as they were before the transformations."""
    return tuple(dict.fromkeys(name.removesuffix(RESCALED).removesuffix(WITHOUT_BIAS) for name in names if name))


def _info(layer: Any, key: str) -> str:
    info = layer.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _in(node: Any, index: int) -> list[int]:
    return list(node.input(index).get_shape())


def _out(node: Any) -> list[int]:
    return list(node.output(0).get_shape())
