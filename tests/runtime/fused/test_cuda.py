"""runtime/fused/cuda.py without a GPU: its kernels, compiled for the CPU, on a fake CUDA in main memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.engines.tensorrt import library as libraries
from diffpress.runtime.engines.tensorrt.engine import TensorRtEngine
from diffpress.runtime.fused.cuda import ADVANCE_TYPES, SOURCE, STEP_TYPES, THREADS, run_fused
from diffpress.runtime.fused.program import fused_program
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


class FakeTensorRt:
    """The names of the tensorrt module that running an engine uses; its engine is a test network."""

    ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 2})
    TensorIOMode = SimpleNamespace(INPUT="input")

    def __init__(self, cuda: Cuda, network: FakeNetwork) -> None:
        self.cuda, self.network = cuda, network
        self.contexts: list[Context] = []

    def Runtime(self, logger: object) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self.engine())

    def engine(self) -> Any:
        names, types = [*self.network.inputs, "out"], {"float32": "FLOAT", "int64": "INT64"}
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            get_tensor_mode=lambda name: "input" if name in self.network.inputs else "output",
            get_tensor_dtype=lambda name: SimpleNamespace(
                name=types[np.dtype(self.network.inputs.get(name, np.float32)).name]
            ),
            create_execution_context=self.context,
        )

    def context(self) -> Context:
        self.contexts.append(Context(self.cuda, self.network))
        return self.contexts[-1]


class OnDevice(TensorRtEngine):
    """The engine of a test network on a fake CUDA; it can only be sampled in one call."""

    def __init__(self, trt: FakeTensorRt, largest_batch: int) -> None:
        rows = {SAMPLE: SHAPE, TIMESTEP: (), "class_labels": ()}
        profile = {name: [(n, *shape) for n in (1, 1, largest_batch)] for name, shape in rows.items()}
        entry = {"profile": profile, "library": "tensorrt", "options": {}, "sha256": ""}
        super().__init__(Path("denoiser.onnx"), b"", entry, EngineOptions())
        self.trt = trt

    def run(self, inputs: dict[str, np.ndarray]) -> NoReturn:
        raise AssertionError("sampled step by step")


@pytest.fixture
def on_device(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OnDevice]:
    """Make an engine whose kernels run on the CPU."""

    def make(network: FakeNetwork, largest_batch: int = 64) -> OnDevice:
        cuda = Cuda()
        trt = FakeTensorRt(cuda, network)
        monkeypatch.setattr(libraries, "cuda_runtime", lambda: cuda)
        monkeypatch.setattr(libraries, "library", lambda name: trt)
        monkeypatch.setattr("diffpress.runtime.fused.cuda._kernels", lambda: Kernels(cuda, library))
        return OnDevice(trt, largest_batch)

    return make


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
    on_device: Callable[..., OnDevice],
    solver: str,
    settings: dict[str, Any],
    timestep_type: type[np.generic],
) -> None:
    settings = settings | ({"clip": False} if solver == "ddim_clip" else {})
    spec = spec_of(solver, **settings)
    network = fake_network("v", SCHEDULE, labelled=True, timestep_type=np.dtype(timestep_type))
    device = on_device(network)
    for seeds in (range(3), range(3, 6)):  # the second run only replays graphs
        found, expected = (generate(one, spec, seeds, batch=3) for one in (device, network))
        np.testing.assert_allclose(found, expected, atol=2e-4 * max(1.0, np.abs(expected).max()))


def test_steps_replay_one_graph_and_buffers_persist(
    fake_network: type[FakeNetwork], on_device: Callable[..., OnDevice]
) -> None:
    spec = spec_of("dpmpp_2m", guidance=3.0)
    device = on_device(fake_network("v", SCHEDULE, labelled=True))
    for count in (6, 13, 20):
        generate(device, spec, range(3), batch=3)
        assert device.cuda.log.count("launched") == count  # all steps but the very first
        assert [context.enqueued for context in device.trt.contexts] == [2]  # one direct run and one capture
    held = len(device.cuda.memory)
    generate(device, spec, range(3), batch=3)
    assert len(device.cuda.memory) == held
    device.close()
    assert device.cuda.memory == {} and device.cuda.log.count("destroyed") == 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_batches_above_the_engines_maximum_are_split_with_their_conditioning(
    fake_network: type[FakeNetwork], on_device: Callable[..., OnDevice], guidance: float
) -> None:
    network, spec = fake_network("v", SCHEDULE, labelled=True), spec_of("unipc_2", guidance)
    device = on_device(network, largest_batch=4)
    found, expected = (generate(one, spec, range(5), labels=[3, 1, 0, 2, 3], batch=5) for one in (device, network))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    rows = sorted(context.shapes[SAMPLE][0] for context in device.trt.contexts)
    assert rows == ([1, 4] if guidance == 1.0 else [2, 4])


@pytest.mark.parametrize("change", ["no NVRTC", "half output", "small engine"])
def test_what_the_device_cannot_fuse_is_left_to_the_loop(
    fake_network: type[FakeNetwork],
    on_device: Callable[..., OnDevice],
    change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device: Any = on_device(fake_network("v", SCHEDULE, labelled=True), 1 if change == "small engine" else 64)
    if change == "no NVRTC":
        monkeypatch.setattr("diffpress.runtime.fused.cuda._kernels", lambda: None)
    if change == "half output":
        device.outputs = {"out": np.dtype(np.float16)}
    program, labels = fused_program(spec_of("ddim", guidance=3.0)), {"class_labels": np.arange(4) % 4}
    assert program is not None
    assert run_fused(device, program, labels, np.zeros((2, *SHAPE), np.float32)) is None


def test_another_plan_changes_the_table_but_not_the_number_of_evaluations(
    fake_network: type[FakeNetwork], on_device: Callable[..., OnDevice]
) -> None:
    network = fake_network("v", SCHEDULE, labelled=True)
    device = on_device(network)
    for solver in ("ddim", "unipc_2", "ddim"):
        spec = spec_of(solver)
        program = fused_program(spec)
        assert program is not None and program.steps == 7
        found, expected = (generate(one, spec, range(2), batch=2) for one in (device, network))
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_programs_with_forecasts_are_run_by_the_loop() -> None:
    spec = DenoiserSpec("v", SCHEDULE, SHAPE, make_plan("ddim", 2, SCHEDULE))
    program = fused_program(spec.with_plan(replace(spec.plan, cache=StepCache("forecast", ("full", "forecast")))))
    engine: Any = None  # it is not even looked at
    assert program is not None and run_fused(engine, program, {}, np.zeros((1, *SHAPE), np.float32)) is None
