"""Fused sampling on the GPU: samples, solver and network stay on the device from the initial noise to the last sample.

    one step = one CUDA graph:   network -> `step` (elementwise solver step) -> `advance` (next timestep)

`step` applies a Program (diffpress.runtime.fused.program) to each element: guidance, x_0 from the output, clipping and
the solver's weighted sums. Previous steps are stored in a ring buffer of MAX_HISTORY pairs. The step index is a counter
in GPU memory, so the same graph is launched for every step, and only the last sample is copied back.

The two kernels are compiled by NVRTC on first use. Without NVRTC the sampler's loop runs instead, with copies to and
from the GPU at each step.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from diffpress.runtime.engines.tensorrt.binding import Binding
from diffpress.runtime.engines.tensorrt.engine import TensorRtEngine
from diffpress.runtime.engines.tensorrt.library import call, cuda_runtime, gpu_capability
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


def run_fused(
    engine: TensorRtEngine, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray
) -> np.ndarray | None:
    """Run all steps of a program on the GPU; see diffpress.runtime.fused.FusedSampler.

    Batches above the engine's maximum are split. Returns None if NVRTC is missing, if the graph's sample or output is
    not float32, if one sample with its guidance halves exceeds the engine's maximum batch, or for a program with
    forecasts, whose outputs are not kept on the device.
    """
    if not program.evaluates_all:
        return None
    each, out = engine.largest_batch // program.halves, next(iter(engine.outputs.values()))
    if each < 1 or {engine.inputs[SAMPLE], out} != {np.dtype(np.float32)} or (kernels := _kernels()) is None:
        return None
    sampled = []
    for first in range(0, len(start), each):
        # conditioning is ordered by halves: cond for all samples, then uncond for all samples
        rows = [half * len(start) + i for half in range(program.halves) for i in range(len(start))[first:][:each]]
        chunk = start[first : first + each]
        timesteps = typed_timesteps([program.timesteps[0]] * len(rows), engine.inputs[TIMESTEP])
        feed = {name: array[rows] for name, array in static_inputs.items()}
        feed |= {SAMPLE: np.concatenate([chunk] * program.halves), TIMESTEP: timesteps}
        binding = engine.binding(feed)
        if binding.attached is None:
            binding.attached = FusedSampling(engine.cuda, kernels, binding, engine.stream)
        sampled.append(binding.attached.run(program, feed, chunk))
    return np.concatenate(sampled)


class Kernels:
    """The kernels `step` and `advance` for this GPU; raises EngineUnavailableError if NVRTC is missing or fails."""

    def __init__(self, capability: str) -> None:
        try:
            self._driver = importlib.import_module("cuda.bindings.driver")
            cubin = _compiled(importlib.import_module("cuda.bindings.nvrtc"), capability)
        except EngineUnavailableError:
            raise
        except Exception as error:  # cuda-python reports a missing library by various exceptions
            raise EngineUnavailableError(f"NVRTC is not available: {' '.join(str(error).split())}") from error
        self._module = call(self._driver, "cuModuleLoadData", cubin)
        self.step, self.advance = (
            call(self._driver, "cuModuleGetFunction", self._module, name) for name in (b"step", b"advance")
        )

    def launch(self, kernel: Any, blocks: int, stream: Any, arguments: tuple[Any, ...], types: tuple[Any, ...]) -> None:
        """Enqueue a kernel with this number of blocks of THREADS threads."""
        call(self._driver, "cuLaunchKernel", kernel, blocks, 1, 1, THREADS, 1, 1, 0, int(stream), (arguments, types), 0)


@cache
def _kernels() -> Kernels | None:
    """Return the kernels for the GPU of this machine, compiled on first use; None if NVRTC is unavailable."""
    try:
        return Kernels(gpu_capability(cuda_runtime()))
    except EngineUnavailableError:
        return None


class FusedSampling:
    """Fused sampling with one Binding: persistent buffers, and one CUDA graph for the steps of all programs."""

    def __init__(self, cuda: Any, kernels: Kernels, binding: Binding, stream: Any) -> None:
        self._cuda, self._kernels, self._binding, self._stream = cuda, kernels, binding, stream
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> (address, bytes)
        self._graph: Any = None
        self._arguments: tuple[Any, ...] = ()

    def run(self, program: Program, feed: Mapping[str, np.ndarray], start: np.ndarray) -> np.ndarray:
        """Run all steps of a program.

        Args:
            program: Coefficients of the steps.
            feed: Inputs of the first evaluation, by name.
            start: Initial sample, float32 [N, C, ...].

        Returns:
            The final sample, float32 [N, C, ...].
        """
        count, (channels, *sides) = start.size, start.shape[1:]
        timestep, tensors = feed[TIMESTEP].dtype, self._binding.device
        # one extra entry, which `advance` reads after the last step
        timesteps = typed_timesteps([*program.timesteps, program.timesteps[-1]], timestep)
        self._upload("x", start)
        self._upload("table", program.table)
        self._upload("offsets", program.offsets)
        self._upload("times", timesteps)
        self._upload("counter", np.zeros(1, np.int32))
        self._reserve("past", MAX_HISTORY * 2 * count * 4)
        self._binding.upload(feed)
        low, high = program.bounds or (-math.inf, math.inf)
        addresses = {name: address for name, (address, _) in self._buffers.items()}
        step = (
            *(addresses["x"], tensors[SAMPLE], tensors[self._binding.outputs[0]]),
            *(addresses["past"], addresses["table"], addresses["offsets"], addresses["counter"]),
            *(count, math.prod(sides), channels, program.halves),
            *(float(program.guidance), float(low), float(high)),
        )
        advance = (addresses["counter"], tensors[TIMESTEP], addresses["times"], len(feed[TIMESTEP]), timestep.itemsize)
        for _ in range(program.steps):
            self._run_step(step, advance)
        return self._download(start.shape)

    def close(self) -> None:
        """Release graph and buffers, but not the binding."""
        if self._graph is not None:
            call(self._cuda, "cudaGraphExecDestroy", self._graph)
        for address, _ in self._buffers.values():
            call(self._cuda, "cudaFree", address)
        self._buffers, self._graph, self._arguments = {}, None, ()

    def _run_step(self, step: tuple[Any, ...], advance: tuple[Any, ...]) -> None:
        """Run one step: directly for new arguments, since libraries allocate in it; then by a captured graph."""
        if (step, advance) == self._arguments and self._graph is not None:
            call(self._cuda, "cudaGraphLaunch", self._graph, self._stream)
            return
        self._enqueue(step, advance)
        if (step, advance) != self._arguments:
            call(self._cuda, "cudaStreamSynchronize", self._stream)
            if self._graph is not None:
                call(self._cuda, "cudaGraphExecDestroy", self._graph)
            self._arguments = (step, advance)
            self._graph = self._binding.captured(lambda: self._enqueue(step, advance))

    def _enqueue(self, step: tuple[Any, ...], advance: tuple[Any, ...]) -> None:
        count = step[7]
        self._binding.execute()
        self._kernels.launch(self._kernels.step, -(-count // THREADS), self._stream, step, STEP_TYPES)
        self._kernels.launch(self._kernels.advance, 1, self._stream, advance, ADVANCE_TYPES)

    def _reserve(self, name: str, size: int) -> int:
        """Return the address of a buffer of at least `size` bytes."""
        address, allocated = self._buffers.get(name, (0, 0))
        if allocated < size:
            if allocated:
                call(self._cuda, "cudaFree", self._buffers.pop(name)[0])
            address = int(call(self._cuda, "cudaMalloc", size))
            self._buffers[name] = (address, size)
        return address

    def _upload(self, name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        target, kind = self._reserve(name, max(array.nbytes, 1)), self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(self._cuda, "cudaMemcpyAsync", target, array.ctypes.data, array.nbytes, kind, self._stream)
        # a driver may defer reading pageable memory: the array must outlive the copy
        call(self._cuda, "cudaStreamSynchronize", self._stream)

    def _download(self, shape: tuple[int, ...]) -> np.ndarray:
        found = np.empty(shape, np.float32)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        address, _ = self._buffers["x"]
        call(self._cuda, "cudaMemcpyAsync", found.ctypes.data, address, found.nbytes, kind, self._stream)
        call(self._cuda, "cudaStreamSynchronize", self._stream)
        return found


def _compiled(nvrtc: Any, capability: str) -> bytes:
    """Compile the kernels to a cubin for this compute capability."""
    program = _result(nvrtc, nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"fused.cu", 0, [], []))
    target = f"--gpu-architecture=sm_{capability.replace('.', '')}".encode()
    _result(nvrtc, nvrtc.nvrtcCompileProgram(program, 1, [target]))
    cubin = b" " * _result(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
    _result(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    _result(nvrtc, nvrtc.nvrtcDestroyProgram(program))
    return cubin


def _result(nvrtc: Any, returned: tuple[Any, ...]) -> Any:
    error, *found = returned
    if int(error) != 0:
        raise EngineUnavailableError(f"NVRTC: {nvrtc.nvrtcGetErrorString(error)[1]!r}")
    return found[0] if found else None
