"""One execution context for one set of input shapes: persistent buffers and a CUDA graph that is replayed.

    pinned host array --copy--> device buffer --kernels--> device buffer --copy--> pinned host array

The first run executes the chain directly, because libraries compile and allocate in it; then it is captured once,
copies included, and each later run is one graph launch. A CUDA graph is tied to the context and addresses it was
captured with, so each set of shapes has its own. `upload`, `execute` and `captured` are the pieces of other chains that
leave the tensors on the GPU.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffpress.runtime.engines.tensorrt.library import call
from diffpress.runtime.errors import EngineUnavailableError


class Binding:
    """Buffers, stream and CUDA graph of one execution context.

    Args:
        cuda: The module cuda.bindings.runtime.
        context: TensorRT execution context.
        stream: CUDA stream of all copies and kernels.
        inputs: Input name -> shape.
        types: Name -> numpy dtype of every input and output.
        replay: Capture and replay a CUDA graph; False enqueues each run, so that a profiler sees the kernels.
    """

    def __init__(
        self,
        cuda: Any,
        context: Any,
        stream: Any,
        inputs: Mapping[str, tuple[int, ...]],
        types: Mapping[str, np.dtype],
        replay: bool = True,
    ) -> None:
        self._cuda, self._context, self._stream = cuda, context, stream
        self.device: dict[str, int] = {}  # name -> GPU address of every input and output
        self.attached: Any = None  # what another layer keeps with this binding; closed with it
        self._pinned: list[int] = []
        self._graph: Any = None
        self._capture = replay
        self._inputs = list(inputs)
        self.outputs = [name for name in types if name not in inputs]
        self._host: dict[str, np.ndarray] = {}
        try:
            for name, shape in inputs.items():
                _check(context.set_input_shape(name, tuple(shape)), f"shape {shape} of {name}")
            for name in types:
                shape = inputs[name] if name in inputs else tuple(context.get_tensor_shape(name))
                self._allocate(name, tuple(shape), types[name])
        except Exception:
            self.close()
            raise

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the engine and return copies of the outputs."""
        for name in self._inputs:
            self._host[name][...] = inputs[name]
        if self._graph is not None:
            call(self._cuda, "cudaGraphLaunch", self._graph, self._stream)
        else:
            self._enqueue()
        call(self._cuda, "cudaStreamSynchronize", self._stream)
        if self._capture:
            self._capture, self._graph = False, self.captured(self._enqueue)
        return {name: self._host[name].copy() for name in self.outputs}

    def upload(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Enqueue copies of the inputs to their GPU buffers."""
        for name in self._inputs:
            self._host[name][...] = inputs[name]
            self._copy(self.device[name], self._host[name].ctypes.data, name, "cudaMemcpyHostToDevice")

    def execute(self) -> None:
        """Enqueue the engine's kernels, from inputs to outputs on the GPU."""
        _check(self._context.execute_async_v3(int(self._stream)), "this run")

    def captured(self, enqueue: Callable[[], None]) -> Any:
        """Capture what `enqueue` enqueues as a CUDA graph; None if the engine cannot be captured."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(self._cuda, "cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except EngineUnavailableError:
            # a capture must be ended; later runs are enqueued instead
            self._cuda.cudaStreamEndCapture(self._stream)
            return None
        error, graph = self._cuda.cudaStreamEndCapture(self._stream)
        if int(error) != 0:
            return None
        try:
            return call(self._cuda, "cudaGraphInstantiate", graph, 0)
        finally:
            call(self._cuda, "cudaGraphDestroy", graph)

    def close(self) -> None:
        """Release what is attached, CUDA graph, buffers and context."""
        if self.attached is not None:
            self.attached.close()
        if self._graph is not None:
            call(self._cuda, "cudaGraphExecDestroy", self._graph)
        self._host.clear()  # views of the pinned memory
        for address in self._pinned:
            call(self._cuda, "cudaFreeHost", address)
        for address in self.device.values():
            call(self._cuda, "cudaFree", address)
        self._pinned, self.device, self._graph, self._context, self.attached = [], {}, None, None, None

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        size = max(math.prod(shape) * dtype.itemsize, 1)
        self.device[name] = int(call(self._cuda, "cudaMalloc", size))
        address = int(call(self._cuda, "cudaMallocHost", size))
        self._pinned.append(address)
        memory = (ctypes.c_byte * size).from_address(address)
        self._host[name] = np.ctypeslib.as_array(memory)[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        _check(self._context.set_tensor_address(name, self.device[name]), f"the address of {name}")

    def _enqueue(self) -> None:
        for name in self._inputs:
            self._copy(self.device[name], self._host[name].ctypes.data, name, "cudaMemcpyHostToDevice")
        self.execute()
        for name in self.outputs:
            self._copy(self._host[name].ctypes.data, self.device[name], name, "cudaMemcpyDeviceToHost")

    def _copy(self, target: int, source: int, name: str, kind: str) -> None:
        direction = getattr(self._cuda.cudaMemcpyKind, kind)
        call(self._cuda, "cudaMemcpyAsync", target, source, self._host[name].nbytes, direction, self._stream)


def _check(success: bool, what: str) -> None:
    if not success:
        raise EngineUnavailableError(f"TensorRT rejects {what}; rebuild the engine with --rebuild")
