"""CUDA in main memory: the CUDA functions that runtime/engines/tensorrt uses, without a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace


class Cuda:
    """cuda.bindings.runtime in main memory: device addresses are ctypes buffers, a graph is a list of calls."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self):
        self.memory, self.recorded, self.log = {}, None, []

    def do(self, work):
        self.recorded.append(work) if self.recorded is not None else work()

    def cudaMalloc(self, size):
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, address):
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(self, to, origin, size, kind, stream):
        self.do(lambda: ctypes.memmove(to, origin, size))
        return (0,)

    def cudaStreamSynchronize(self, stream):
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recorded = []
        return (0,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.recorded = self.recorded, None
        return 0, recorded

    def cudaGraphInstantiate(self, graph, flags):
        return 0, graph

    def cudaGraphDestroy(self, graph):
        return (0,)

    def cudaGraphExecDestroy(self, graph):
        self.log.append("destroyed")
        return (0,)

    def cudaGraphLaunch(self, graph, stream):
        self.log.append("launched")
        for work in graph:
            work()
        return (0,)
