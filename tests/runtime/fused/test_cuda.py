"""runtime/fused/cuda.py without a GPU: its kernels, compiled for the processor, on a CUDA of main memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.engines.tensorrt.binding import Binding
from diffpress.runtime.fused.cuda import ADVANCE_TYPES, SOURCE, STEP_TYPES, THREADS, FusedSampling
from diffpress.runtime.fused.program import fused_program
from diffpress.runtime.network_inputs import SAMPLE, TIMESTEP
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import OutputCorrection, make_plan
from diffpress.runtime.spec import DenoiserSpec
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
    """The kernels as functions of the processor, called for one thread after the other."""

    def __init__(self, cuda, library):
        self.cuda, self.library, self.launched = cuda, library, []
        self.step, self.advance = library.step, library.advance

    def launch(self, kernel, blocks, stream, given, types):
        self.launched.append(kernel)
        typed = [kind(value) for kind, value in zip(types, given, strict=True)]
        self.cuda.do(lambda: self.compute(kernel, blocks, typed))

    def compute(self, kernel, blocks, given):
        def place(name):
            return ctypes.c_int.in_dll(self.library, name)

        # one thread does the whole of `advance`: without others to wait for, the last write is the last
        threads = 1 if kernel is self.advance else THREADS
        place("blockDim").value = threads
        for block in range(blocks):
            for thread in range(threads):
                place("blockIdx").value, place("threadIdx").value = block, thread
                kernel(*given)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler: the kernels were not run")
    folder = tmp_path_factory.mktemp("walk")
    (folder / "walk.cpp").write_text(SHIM + SOURCE)
    made = folder / "walk.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", made, folder / "walk.cpp"], check=True)
    found = ctypes.CDLL(str(made))
    found.step.argtypes, found.advance.argtypes = STEP_TYPES, ADVANCE_TYPES
    return found


class Context:
    """The network of a test, read and written where the addresses say."""

    def __init__(self, cuda, network):
        self.cuda, self.network, self.shapes, self.addresses, self.enqueued = cuda, network, {}, {}, 0

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        return self.shapes[SAMPLE]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        self.enqueued += 1
        self.cuda.do(self.compute)
        return True

    def at(self, name, dtype, shape):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_byte * size).from_address(self.addresses[name])
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def compute(self):
        types = self.network.inputs
        out = self.network.run({name: self.at(name, types[name], self.shapes[name]).copy() for name in types})
        self.at("out", np.float32, self.shapes[SAMPLE])[...] = out


class OnDevice:
    """Walks as TensorRtEngine does, without parts: one binding, kept over all calls."""

    def __init__(self, network, library):
        self.cuda, self.network, self.inputs = Cuda(), network, network.inputs
        self.kernels, self.walk_of, self.context = Kernels(self.cuda, library), None, None

    def run(self, inputs):
        raise AssertionError("walked step by step")

    def run_fused(self, program, cond, start):
        times = np.full(program.halves * len(start), program.timesteps[0]).astype(self.inputs[TIMESTEP])
        feed = {**cond, SAMPLE: np.concatenate([start] * program.halves), TIMESTEP: times}
        if self.walk_of is None:
            self.context = Context(self.cuda, self.network)
            shapes = {name: feed[name].shape for name in self.inputs}
            types = {**self.inputs, "out": np.dtype(np.float32)}
            binding = Binding(self.cuda, self.context, 7, shapes, types)
            self.walk_of = FusedSampling(self.cuda, self.kernels, binding, 7)
        return self.walk_of.run(program, feed, start)


def spec_of(solver, guidance=1.0, **plan):
    made = make_plan(solver, 7, SCHEDULE, guidance=guidance, clip=plan.pop("clip", True))
    if plan.pop("corrected", False):
        bias = tuple(tuple(row) for row in np.random.default_rng(0).normal(0, 0.1, (7, 2)).tolist())
        made = replace(made, output_corrections=tuple(OutputCorrection(0.05, one) for one in bias))
    cond = Conditioning("class", classes=4, null_label=4)
    return DenoiserSpec("v", SCHEDULE, SHAPE, made, cond, data_range=(-0.2, 0.4))  # so narrow that bounds are met


@pytest.mark.parametrize("solver", ["ddim", "ddim_clip", "dpmpp_3m", "unipc_3", "ipndm"])
@pytest.mark.parametrize("settings", [{}, {"guidance": 3.0}, {"clip": False, "corrected": True}])
@pytest.mark.parametrize("timestep_type", [np.float32, np.int64])
def test_a_walk_on_the_device_is_the_samplers_own(fake_network, library, solver, settings, timestep_type):
    settings = settings | ({"clip": False} if solver == "ddim_clip" else {})
    spec = spec_of(solver, **settings)
    network = fake_network("v", SCHEDULE, labelled=True, timestep_type=np.dtype(timestep_type))
    device = OnDevice(network, library)
    for seeds in (range(3), range(3, 6)):  # the second walk is of graphs alone
        found, wanted = (generate(one, spec, seeds, batch=3) for one in (device, network))
        np.testing.assert_allclose(found, wanted, atol=2e-4 * max(1.0, np.abs(wanted).max()))


def test_steps_are_replays_of_one_graph_and_buffers_stay(fake_network, library):
    spec = spec_of("dpmpp_2m", guidance=3.0)
    device = OnDevice(fake_network("v", SCHEDULE, labelled=True), library)
    for count in (6, 13, 20):
        generate(device, spec, range(3), batch=3)
        assert device.cuda.log.count("launched") == count  # all steps but the very first
        assert device.context.enqueued == 2  # as it is, and captured
    held = len(device.cuda.memory)
    generate(device, spec, range(3), batch=3)
    assert len(device.cuda.memory) == held
    device.walk_of.close()
    assert len(device.cuda.memory) == held - 6 and device.cuda.log[-1] == "destroyed"


def test_another_plan_is_another_table_and_not_another_network_call(fake_network, library):
    network = fake_network("v", SCHEDULE, labelled=True)
    device = OnDevice(network, library)
    for solver in ("ddim", "unipc_2", "ddim"):
        spec = spec_of(solver)
        assert fused_program(spec).steps == 7
        found, wanted = (generate(one, spec, range(2), batch=2) for one in (device, network))
        np.testing.assert_allclose(found, wanted, atol=2e-4)
