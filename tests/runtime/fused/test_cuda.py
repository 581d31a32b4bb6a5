"""runtime/fused/cuda.py without a GPU: its kernels, compiled for the CPU, on a fake CUDA in main memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import pytest

from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.engines.tensorrt.binding import Binding
from diffpress.runtime.fused.cuda import ADVANCE_TYPES, SOURCE, STEP_TYPES, THREADS, FusedSampling
from diffpress.runtime.fused.program import Program, fused_program
from diffpress.runtime.network_inputs import SAMPLE, TIMESTEP
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import OutputCorrection, make_plan
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.conftest import FakeNetwork
from tests.runtime.fake_cuda import Cuda

SHIM = """
#include <cmath>
struct Place { int x; };
extern "C" { Place threadIdx, blockIdx, blockDim; }
#define __global__
#define __syncthreads()
"""
SHAPE = (2, 3, 4)
SCHEDULE = betas_schedule("scaled_linear", 1000, 0.00085, 0.012)


class Kernels:
    """The kernels as CPU functions, called for one thread after the other."""

    def __init__(self, cuda: Cuda, library: ctypes.CDLL) -> None:
        self.cuda, self.library = cuda, library
        self.launched: list[Any] = []
        self.step, self.advance = library.step, library.advance

    def launch(self, kernel: Any, blocks: int, stream: object, arguments: Sequence[Any], types: Sequence[Any]) -> None:
        self.launched.append(kernel)
        typed = [kind(value) for kind, value in zip(types, arguments, strict=True)]
        self.cuda.do(lambda: self.compute(kernel, blocks, typed))

    def compute(self, kernel: Any, blocks: int, arguments: Sequence[Any]) -> None:
        def variable(name: str) -> ctypes.c_int:
            return ctypes.c_int.in_dll(self.library, name)

        # `advance` runs in a single thread, since __syncthreads is a no-op here
        threads = 1 if kernel is self.advance else THREADS
        variable("blockDim").value = threads
        for block in range(blocks):
            for thread in range(threads):
                variable("blockIdx").value, variable("threadIdx").value = block, thread
                kernel(*arguments)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler: the kernels were not run")
    folder = tmp_path_factory.mktemp("fused")
    (folder / "fused.cpp").write_text(SHIM + SOURCE)
    shared_library = folder / "fused.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shared_library, folder / "fused.cpp"], check=True)
    found: Any = ctypes.CDLL(str(shared_library))
    found.step.argtypes, found.advance.argtypes = STEP_TYPES, ADVANCE_TYPES
    return found


class Context:
    """A fake execution context that runs a test network at the given addresses."""

    def __init__(self, cuda: Cuda, network: FakeNetwork) -> None:
        self.cuda, self.network, self.enqueued = cuda, network, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[SAMPLE]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: object) -> bool:
        self.enqueued += 1
        self.cuda.do(self.compute)
        return True

    def at(self, name: str, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_byte * size).from_address(self.addresses[name])
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def compute(self) -> None:
        types = self.network.inputs
        out = self.network.run({name: self.at(name, types[name], self.shapes[name]).copy() for name in types})
        self.at("out", np.float32, self.shapes[SAMPLE])[...] = out


class OnDevice:
    """Fused sampling as in TensorRtEngine, without batch splitting: one binding for all runs."""

    def __init__(self, network: FakeNetwork, library: ctypes.CDLL) -> None:
        self.cuda, self.network, self.inputs = Cuda(), network, network.inputs
        self.kernels: Any = Kernels(self.cuda, library)
        self.fused: FusedSampling | None = None
        self.context: Context | None = None

    def run(self, inputs: dict[str, np.ndarray]) -> NoReturn:
        raise AssertionError("sampled step by step")

    def run_fused(self, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray) -> np.ndarray:
        times = np.full(program.halves * len(start), program.timesteps[0]).astype(self.inputs[TIMESTEP])
        feed = {**static_inputs, SAMPLE: np.concatenate([start] * program.halves), TIMESTEP: times}
        if self.fused is None:
            self.context = Context(self.cuda, self.network)
            shapes = {name: feed[name].shape for name in self.inputs}
            types = {**self.inputs, "out": np.dtype(np.float32)}
            binding = Binding(self.cuda, self.context, 7, shapes, types)
            self.fused = FusedSampling(self.cuda, self.kernels, binding, 7)
        return self.fused.run(program, feed, start)


def spec_of(solver: str, guidance: float = 1.0, **plan: Any) -> DenoiserSpec:
    sampling_plan = make_plan(solver, 7, SCHEDULE, guidance=guidance, clip=plan.pop("clip", True))
    if plan.pop("corrected", False):
        bias = tuple(tuple(row) for row in np.random.default_rng(0).normal(0, 0.1, (7, 2)).tolist())
        sampling_plan = replace(sampling_plan, output_corrections=tuple(OutputCorrection(0.05, row) for row in bias))
    conditioning = Conditioning("class", classes=4, null_label=4)
    return DenoiserSpec(
        "v", SCHEDULE, SHAPE, sampling_plan, conditioning, data_range=(-0.2, 0.4)
    )  # narrow, so that values are clipped


@pytest.mark.parametrize("solver", ["ddim", "ddim_clip", "dpmpp_3m", "unipc_3", "ipndm"])
@pytest.mark.parametrize("settings", [{}, {"guidance": 3.0}, {"clip": False, "corrected": True}])
@pytest.mark.parametrize("timestep_type", [np.float32, np.int64])
def test_fused_sampling_on_the_device_equals_the_samplers_loop(
    fake_network: type[FakeNetwork],
    library: ctypes.CDLL,
    solver: str,
    settings: dict[str, Any],
    timestep_type: type[np.generic],
) -> None:
    settings = settings | ({"clip": False} if solver == "ddim_clip" else {})
    spec = spec_of(solver, **settings)
    network = fake_network("v", SCHEDULE, labelled=True, timestep_type=np.dtype(timestep_type))
    device = OnDevice(network, library)
    for seeds in (range(3), range(3, 6)):  # the second run only replays graphs
        found, expected = (generate(one, spec, seeds, batch=3) for one in (device, network))
        np.testing.assert_allclose(found, expected, atol=2e-4 * max(1.0, np.abs(expected).max()))


def test_steps_replay_one_graph_and_buffers_persist(fake_network: type[FakeNetwork], library: ctypes.CDLL) -> None:
    spec = spec_of("dpmpp_2m", guidance=3.0)
    device = OnDevice(fake_network("v", SCHEDULE, labelled=True), library)
    for count in (6, 13, 20):
        generate(device, spec, range(3), batch=3)
        assert device.cuda.log.count("launched") == count  # all steps but the very first
        assert device.context is not None and device.context.enqueued == 2  # one direct run and one capture
    held = len(device.cuda.memory)
    generate(device, spec, range(3), batch=3)
    assert len(device.cuda.memory) == held
    assert device.fused is not None
    device.fused.close()
    assert len(device.cuda.memory) == held - 6 and device.cuda.log[-1] == "destroyed"


def test_another_plan_changes_the_table_but_not_the_number_of_evaluations(
    fake_network: type[FakeNetwork], library: ctypes.CDLL
) -> None:
    network = fake_network("v", SCHEDULE, labelled=True)
    device = OnDevice(network, library)
    for solver in ("ddim", "unipc_2", "ddim"):
        spec = spec_of(solver)
        program = fused_program(spec)
        assert program is not None and program.steps == 7
        found, expected = (generate(one, spec, range(2), batch=2) for one in (device, network))
        np.testing.assert_allclose(found, expected, atol=2e-4)
