"""CUDA in main memory: the CUDA functions that runtime/engines/tensorrt uses, without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace


class Cuda:
    """cuda.bindings.runtime in main memory: device addresses are ctypes buffers, a graph is a list of calls."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.recorded: list[Callable[[], object]] | None = None
        self.log: list[str] = []

    def do(self, work: Callable[[], object]) -> None:
        self.recorded.append(work) if self.recorded is not None else work()

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, address: int) -> tuple[int]:
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(self, to: int, origin: int, size: int, kind: int, stream: object) -> tuple[int]:
        self.do(lambda: ctypes.memmove(to, origin, size))
        return (0,)

    cudaStreamNonBlocking = 1  # noqa: N815

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return 0, 7

    def cudaStreamDestroy(self, stream: object) -> tuple[int]:
        return (0,)

    def cudaStreamSynchronize(self, stream: object) -> tuple[int]:
        return (0,)

    def cudaStreamBeginCapture(self, stream: object, mode: int) -> tuple[int]:
        self.recorded = []
        return (0,)

    def cudaStreamEndCapture(self, stream: object) -> tuple[int, list[Callable[[], object]] | None]:
        recorded, self.recorded = self.recorded, None
        return 0, recorded

    def cudaGraphInstantiate(
        self, graph: list[Callable[[], object]], flags: int
    ) -> tuple[int, list[Callable[[], object]]]:
        return 0, graph

    def cudaGraphDestroy(self, graph: list[Callable[[], object]]) -> tuple[int]:
        return (0,)

    def cudaGraphExecDestroy(self, graph: list[Callable[[], object]]) -> tuple[int]:
        self.log.append("destroyed")
        return (0,)

    def cudaGraphLaunch(self, graph: list[Callable[[], object]], stream: object) -> tuple[int]:
        self.log.append("launched")
        for work in graph:
            work()
        return (0,)
