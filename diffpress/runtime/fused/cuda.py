"""A walk on the GPU: samples, solver and network stay there from the starting noise to the last sample.

    one step = one CUDA graph:   network -> `step`, elementwise -> `advance`, the next timestep

`step` does for each number of a sample what a Program says (diffpress.runtime.fused.program): guidance, x_0 read off the output,
bounds, and the sums that are the solver. Past steps lie in a ring of MAX_HISTORY pairs. Where the walk stands is a counter
in the GPU's memory, so the same graph is launched for every step; nothing comes back before the last one.

The two kernels are compiled by NVRTC when an engine walks for the first time; where it is not installed, the sampler's
own loop does the same with a copy to and fro in each step.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffpress.runtime.engines.tensorrt.binding import Binding
from diffpress.runtime.engines.tensorrt.library import call
from diffpress.runtime.errors import EngineUnavailableError
from diffpress.runtime.fused.program import COLUMNS, TERMS, Program
from diffpress.runtime.network_inputs import SAMPLE, TIMESTEP, typed_timesteps
from diffpress.runtime.solvers.contract import MAX_HISTORY

THREADS = 256

SOURCE = (
    f"#define MAX_HISTORY {MAX_HISTORY}\n#define TERMS {TERMS}\n#define COLUMNS {COLUMNS}\n"
    + r"""
extern "C" __global__ void step(
    float* x, float* sample, const float* out, float* past, const float* table, const float* offsets,
    const int* counter, int count, int plane, int channels, int halves, float guidance, float low, float high) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  int at = *counter;
  const float* row = table + at * COLUMNS;
  float o = out[i];
  if (halves == 2) o = out[i + count] + guidance * (o - out[i + count]);
  float guess = row[0] * x[i] + row[1] * o + offsets[at * channels + i / plane % channels];
  guess = fminf(fmaxf(guess, low), high);
  float terms[TERMS] = {x[i], guess, fminf(fmaxf(guess, -1.0f), 1.0f)};
  for (int back = 1; back <= MAX_HISTORY; back++)
    for (int which = 0; which < 2; which++)
      terms[1 + 2 * back + which] = at < back ? 0.0f : past[((at - back) % MAX_HISTORY * 2 + which) * count + i];
  float kept = 0.0f, moved = 0.0f;
  for (int j = 0; j < TERMS; j++) {
    kept += row[2 + j] * terms[j];
    moved += row[2 + TERMS + j] * terms[j];
  }
  past[at % MAX_HISTORY * 2 * count + i] = kept;
  past[(at % MAX_HISTORY * 2 + 1) * count + i] = guess;
  x[i] = moved;
  for (int half = 0; half < halves; half++) sample[half * count + i] = moved;
}

extern "C" __global__ void advance(int* counter, char* timestep, const char* timesteps, int rows, int size) {
  int next = *counter + 1;
  for (int i = threadIdx.x; i < rows * size; i += blockDim.x) timestep[i] = timesteps[next * size + i % size];
  __syncthreads();
  if (threadIdx.x == 0) *counter = next;
}
"""
)
STEP_TYPES = (*[ctypes.c_void_p] * 7, *[ctypes.c_int] * 4, *[ctypes.c_float] * 3)
ADVANCE_TYPES = (*[ctypes.c_void_p] * 3, *[ctypes.c_int] * 2)


class Kernels:
    """`step` and `advance`, compiled for this GPU; raises Unfit where NVRTC is not there or refuses."""

    def __init__(self, capability: str) -> None:
        try:
            self._driver = importlib.import_module("cuda.bindings.driver")
            cubin = _compiled(importlib.import_module("cuda.bindings.nvrtc"), capability)
        except EngineUnavailableError:
            raise
        except Exception as error:  # cuda-python says in ways of its own that a library is missing
            raise EngineUnavailableError(f"NVRTC cannot be used: {' '.join(str(error).split())}") from error
        self._module = call(self._driver, "cuModuleLoadData", cubin)
        self.step, self.advance = (
            call(self._driver, "cuModuleGetFunction", self._module, name) for name in (b"step", b"advance")
        )

    def launch(self, kernel: Any, blocks: int, stream: Any, given: tuple[Any, ...], types: tuple[Any, ...]) -> None:
        """Enqueue a kernel on so many blocks."""
        call(self._driver, "cuLaunchKernel", kernel, blocks, 1, 1, THREADS, 1, 1, 0, int(stream), (given, types), 0)


class FusedSampling:
    """The walks of one Binding: buffers that stay, and one graph for a step of any program."""

    def __init__(self, cuda: Any, kernels: Kernels, binding: Binding, stream: Any) -> None:
        self._cuda, self._kernels, self._binding, self._stream = cuda, kernels, binding, stream
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> (address, bytes)
        self._graph: Any = None
        self._known: tuple[Any, ...] = ()

    def run(self, program: Program, feed: Mapping[str, np.ndarray], start: np.ndarray) -> np.ndarray:
        """The last sample, float32 [N, C, H, W], of a walk from `start`; `feed` are the inputs of its first call."""
        count, (channels, *sides) = start.size, start.shape[1:]
        timestep, at = feed[TIMESTEP].dtype, self._binding.device
        # one behind the last, for `advance` to read after the last step
        times = typed_timesteps([*program.timesteps, program.timesteps[-1]], timestep)
        self._upload("x", start)
        self._upload("table", program.table)
        self._upload("offsets", program.offsets)
        self._upload("times", times)
        self._upload("counter", np.zeros(1, np.int32))
        self._reserve("past", MAX_HISTORY * 2 * count * 4)
        self._binding.upload(feed)
        low, high = program.bounds or (-math.inf, math.inf)
        own = {name: address for name, (address, _) in self._buffers.items()}
        step = (
            *(own["x"], at[SAMPLE], at[self._binding.outputs[0]]),
            *(own["past"], own["table"], own["offsets"], own["counter"]),
            *(count, math.prod(sides), channels, program.halves),
            *(float(program.guidance), float(low), float(high)),
        )
        advance = (own["counter"], at[TIMESTEP], own["times"], len(feed[TIMESTEP]), timestep.itemsize)
        for _ in range(program.steps):
            self._one(step, advance)
        return self._download(start.shape)

    def close(self) -> None:
        """Release graph and buffers; the binding stays."""
        if self._graph is not None:
            call(self._cuda, "cudaGraphExecDestroy", self._graph)
        for address, _ in self._buffers.values():
            call(self._cuda, "cudaFree", address)
        self._buffers, self._graph, self._known = {}, None, ()

    def _one(self, step: tuple[Any, ...], advance: tuple[Any, ...]) -> None:
        """A step: as it is with new arguments, for the libraries to allocate in; then by a graph of these very ones."""
        if (step, advance) == self._known and self._graph is not None:
            call(self._cuda, "cudaGraphLaunch", self._graph, self._stream)
            return
        self._enqueue(step, advance)
        if (step, advance) != self._known:
            call(self._cuda, "cudaStreamSynchronize", self._stream)
            if self._graph is not None:
                call(self._cuda, "cudaGraphExecDestroy", self._graph)
            self._known = (step, advance)
            self._graph = self._binding.captured(lambda: self._enqueue(step, advance))

    def _enqueue(self, step: tuple[Any, ...], advance: tuple[Any, ...]) -> None:
        count = step[7]
        self._binding.execute()
        self._kernels.launch(self._kernels.step, -(-count // THREADS), self._stream, step, STEP_TYPES)
        self._kernels.launch(self._kernels.advance, 1, self._stream, advance, ADVANCE_TYPES)

    def _reserve(self, name: str, size: int) -> int:
        """The address of a buffer of at least that size."""
        address, there = self._buffers.get(name, (0, 0))
        if there < size:
            if there:
                call(self._cuda, "cudaFree", self._buffers.pop(name)[0])
            address = int(call(self._cuda, "cudaMalloc", size))
            self._buffers[name] = (address, size)
        return address

    def _upload(self, name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        to, kind = self._reserve(name, max(array.nbytes, 1)), self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(self._cuda, "cudaMemcpyAsync", to, array.ctypes.data, array.nbytes, kind, self._stream)
        # ordinary memory is read while the call runs, unless a driver defers it: the array must outlive that
        call(self._cuda, "cudaStreamSynchronize", self._stream)

    def _download(self, shape: tuple[int, ...]) -> np.ndarray:
        found = np.empty(shape, np.float32)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        address, _ = self._buffers["x"]
        call(self._cuda, "cudaMemcpyAsync", found.ctypes.data, address, found.nbytes, kind, self._stream)
        call(self._cuda, "cudaStreamSynchronize", self._stream)
        return found


def _compiled(nvrtc: Any, capability: str) -> bytes:
    """The kernels as machine code for that GPU."""
    program = _said(nvrtc, nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"walk.cu", 0, [], []))
    target = f"--gpu-architecture=sm_{capability.replace('.', '')}".encode()
    _said(nvrtc, nvrtc.nvrtcCompileProgram(program, 1, [target]))
    cubin = b" " * _said(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
    _said(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    _said(nvrtc, nvrtc.nvrtcDestroyProgram(program))
    return cubin


def _said(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    error, *found = answer
    if int(error) != 0:
        raise EngineUnavailableError(f"NVRTC: {nvrtc.nvrtcGetErrorString(error)[1]!r}")
    return found[0] if found else None
