"""One execution context for one set of input shapes: buffers that stay, and one CUDA graph that is replayed.

    pinned host array --copy--> device buffer --kernels--> device buffer --copy--> pinned host array

The first call runs the chain as it is, for libraries compile and allocate in it; then it is captured once, copies
included, and each later call is one launch. (Where the solver can go without the copies, walk.py does.) A graph belongs
to the context and addresses it was captured with, so each set of shapes has its own.
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
    """`inputs` name -> shape, `types` name -> numpy type of every input and output; `cuda` is cuda.bindings.runtime.

    `replay` False runs the chain as it is each time, for a profiler to see its kernels.
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
        self.device: dict[str, int] = {}  # where every input and output lies on the GPU
        self._pinned: list[int] = []
        self._graph: Any = None
        self._capture = replay
        self._inputs = list(inputs)
        self.outputs = [name for name in types if name not in inputs]
        self._host: dict[str, np.ndarray] = {}
        try:
            for name, shape in inputs.items():
                _checked(context.set_input_shape(name, tuple(shape)), f"shape {shape} of {name}")
            for name in types:
                shape = inputs[name] if name in inputs else tuple(context.get_tensor_shape(name))
                self._allocate(name, tuple(shape), types[name])
        except Exception:
            self.close()
            raise

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs for these inputs, as arrays of the caller's own."""
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
        """Put the inputs where the plan reads them."""
        for name in self._inputs:
            self._host[name][...] = inputs[name]
            self._copy(self.device[name], self._host[name].ctypes.data, name, "cudaMemcpyHostToDevice")

    def execute(self) -> None:
        """Enqueue the plan's own kernels: from inputs on the GPU to outputs there."""
        _checked(self._context.execute_async_v3(int(self._stream)), "this run")

    def captured(self, enqueue: Callable[[], None]) -> Any:
        """What it enqueues as a CUDA graph; None where the plan does something that cannot be captured."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(self._cuda, "cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except EngineUnavailableError:
            # what was begun must be ended; the failed capture is then thrown away, and calls go on one by one
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
        """Release graph, buffers and context."""
        if self._graph is not None:
            call(self._cuda, "cudaGraphExecDestroy", self._graph)
        self._host.clear()  # views of the pinned memory
        for address in self._pinned:
            call(self._cuda, "cudaFreeHost", address)
        for address in self.device.values():
            call(self._cuda, "cudaFree", address)
        self._pinned, self.device, self._graph, self._context = [], {}, None, None

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        size = max(math.prod(shape) * dtype.itemsize, 1)
        self.device[name] = int(call(self._cuda, "cudaMalloc", size))
        address = int(call(self._cuda, "cudaMallocHost", size))
        self._pinned.append(address)
        memory = (ctypes.c_byte * size).from_address(address)
        self._host[name] = np.ctypeslib.as_array(memory)[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        _checked(self._context.set_tensor_address(name, self.device[name]), f"the address of {name}")

    def _enqueue(self) -> None:
        for name in self._inputs:
            self._copy(self.device[name], self._host[name].ctypes.data, name, "cudaMemcpyHostToDevice")
        self.execute()
        for name in self.outputs:
            self._copy(self._host[name].ctypes.data, self.device[name], name, "cudaMemcpyDeviceToHost")

    def _copy(self, to: int, origin: int, name: str, kind: str) -> None:
        direction = getattr(self._cuda.cudaMemcpyKind, kind)
        call(self._cuda, "cudaMemcpyAsync", to, origin, self._host[name].nbytes, direction, self._stream)


def _checked(done: bool, what: str) -> None:
    if not done:
        raise EngineUnavailableError(f"TensorRT refuses {what}; rebuild the plan with --rebuild")
