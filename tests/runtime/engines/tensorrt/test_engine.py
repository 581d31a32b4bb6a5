"""Buffers, CUDA graph, progress and messages of the TensorRT backend, with a fake CUDA in main memory.

Also checks that the real libraries have every name that is used. No TensorRT kernel runs here.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import importlib.util
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.engines.tensorrt.binding import Binding
from diffpress.runtime.engines.tensorrt.engine import split_batch
from diffpress.runtime.engines.tensorrt.library import call, gpu_capability
from diffpress.runtime.engines.tensorrt.messages import build_error, one_line
from diffpress.runtime.engines.tensorrt.monitor import Phases, monitor
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import EngineUnavailableError
from tests.runtime.fake_cuda import Cuda

FOLDER, FUSED = Path("diffpress/runtime/engines/tensorrt"), Path("diffpress/runtime/fused/cuda.py")
SELF = re.compile(r"\b(self|engine)\._?")
TYPES: dict[str, np.dtype] = {"x": np.dtype(np.float32), "t": np.dtype(np.int64), "out": np.dtype(np.float32)}


class Context:
    """A fake execution context: out = 2 x + t, at the given addresses."""

    def __init__(self, cuda: Cuda, capturable: bool = True) -> None:
        self.cuda, self.capturable, self.enqueued = cuda, capturable, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: object) -> bool:
        if self.cuda.recorded is not None and not self.capturable:
            return False
        self.enqueued += 1
        self.cuda.do(self.compute)
        return True

    def compute(self) -> None:
        def array(name: str, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            memory = (ctypes.c_byte * size).from_address(self.addresses[name])
            return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

        x, t = array("x", np.float32, self.shapes["x"]), array("t", np.int64, self.shapes["t"])
        array("out", np.float32, self.shapes["x"])[...] = 2 * x + t[:, None]


def inputs(seed: int, batch: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {"x": draw.standard_normal((batch, 4), np.float32), "t": draw.integers(0, 9, batch)}


def bound(cuda: Cuda, **settings: Any) -> tuple[Context, Binding]:
    context = Context(cuda, settings.pop("capturable", True))
    return context, Binding(cuda, context, 7, {"x": (3, 4), "t": (3,)}, TYPES, **settings)


@pytest.mark.parametrize(("settings", "launched"), [({}, 4), ({"capturable": False}, 0), ({"replay": False}, 0)])
def test_the_first_run_is_enqueued_and_later_ones_replay_one_graph(settings: dict[str, Any], launched: int) -> None:
    cuda = Cuda()
    context, binding = bound(cuda, **settings)
    results = [(inputs(seed), binding.run(inputs(seed))) for seed in range(5)]
    for feed, found in results:  # checked after all runs: outputs must not be overwritten
        np.testing.assert_array_equal(found["out"], (2 * feed["x"] + feed["t"][:, None]).astype(np.float32))
    assert cuda.log.count("launched") == launched
    assert context.enqueued == (2 if launched else 5)
    assert len(cuda.memory) == 6  # one host and one device buffer per tensor, regardless of the number of runs
    binding.close()
    assert cuda.memory == {}


def test_a_failed_binding_frees_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    context = Context(cuda)
    monkeypatch.setattr(context, "set_tensor_address", lambda name, address: name != "out")
    with pytest.raises(EngineUnavailableError, match="rejects the address of out"):
        Binding(cuda, context, 7, {"x": (3, 4), "t": (3,)}, TYPES)
    assert cuda.memory == {}


def test_a_batch_above_the_maximum_is_split_in_order() -> None:
    feed = inputs(0, batch=7)
    chunks = list(split_batch(feed, 3))
    assert [len(chunk["t"]) for chunk in chunks] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([chunk["x"] for chunk in chunks]), feed["x"])


def test_a_cuda_error_is_one_line() -> None:
    cuda = SimpleNamespace(
        cudaGetDeviceCount=lambda: (35, None), cudaGetErrorString=lambda error: (0, b"driver too old")
    )
    with pytest.raises(EngineUnavailableError, match=r"no usable NVIDIA GPU .*cudaGetDeviceCount.*driver too old"):
        gpu_capability(cuda)
    with pytest.raises(EngineUnavailableError, match=r"no NVIDIA GPU found$"):
        gpu_capability(SimpleNamespace(cudaGetDeviceCount=lambda: (0, 0)))
    assert call(SimpleNamespace(f=lambda a: (0, a, 2)), "f", 1) == (1, 2)


def used(variable: str) -> set[str]:
    """Names used in the backend: 'A.B' of variable.A.B, and 'A' of call(variable, "A")."""
    found: set[str] = set()
    for file in (*FOLDER.glob("*.py"), FUSED):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                text = SELF.sub("", ast.unparse(node))
                if text.startswith(f"{variable}.") and text.count(".") <= 2:
                    found.add(text.removeprefix(f"{variable}."))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("call"):
                target, *names = node.args
                if SELF.sub("", ast.unparse(target)) == variable:
                    found |= {str(name.value) for name in names[:1] if isinstance(name, ast.Constant)}
    return found


@pytest.mark.parametrize(("variable", "module"), [("cuda", "cuda.bindings.runtime"), ("trt", "tensorrt_rtx")])
def test_the_real_library_has_every_name_that_is_used(variable: str, module: str) -> None:
    try:
        library = importlib.import_module(module)
    except ImportError:
        pytest.skip(f"{module} is not installed: its names were not checked")
    names = used(variable)
    assert len(names) > 10
    for name in sorted(names):
        owner: Any = library
        for attribute in name.split("."):
            assert hasattr(owner, attribute) or attribute.startswith("__"), name
            owner = getattr(owner, attribute, None)


def test_nested_phases_are_part_of_the_parents_progress() -> None:
    phases = Phases()
    phases.start("build", None, 4)
    phases.step("build")
    phases.start("inner", "build", 2)
    phases.step("inner")
    share, phase = phases.now()
    assert share == pytest.approx((1 + 0.5) / 4) and phase == "inner"
    phases.step("inner")
    phases.finish("inner")
    phases.step("build")
    assert phases.now() == (0.5, "build")
    phases.finish("build")
    assert phases.now() == (0.0, "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "level", "plain_every_s", "shown", "logged"),
    [
        (Terminal(), "INFO", 0.0, "\r\033[2K  building g: 50%  build\r\033[2K", []),
        (Terminal(), "WARNING", 0.0, "", []),  # nobody follows the progress
        (io.StringIO(), "INFO", 0.0, "", ["building g: 50%  build"]),
        (io.StringIO(), "INFO", 10.0, "", []),  # too soon
    ],
)
def test_progress_is_live_on_a_terminal_and_rare_elsewhere(
    stream: io.StringIO,
    level: str,
    plain_every_s: float,
    shown: str,
    logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("diffpress.runtime.engines.tensorrt.monitor.LIVE_EVERY_S", 0.0)
    monkeypatch.setattr("diffpress.runtime.engines.tensorrt.monitor.PLAIN_EVERY_S", plain_every_s)
    monkeypatch.setattr("sys.stdout", stream)
    with caplog.at_level(level, logger="diffpress"):
        progress = monitor(SimpleNamespace(IProgressMonitor=object), "g")
        progress.phase_start("build", None, 2)
        assert progress.step_complete("build", 0)
        progress.phase_finish("build")
        progress.clear()
    assert stream.getvalue() == shown and caplog.messages == logged


def test_an_interrupt_stops_the_build() -> None:
    progress = monitor(SimpleNamespace(IProgressMonitor=object), "g")
    progress._report = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    assert progress.step_complete("build", 0) is False and progress.interrupted


HARDWARE = (
    "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) "
    "sm86, because the model contains HW-specific datatypes: fp8_e4m3. In compileGraph at /_src/a/b.cpp:2012)"
)


def test_build_errors_state_the_reason_and_what_to_try() -> None:
    message = str(build_error("g.onnx", "tensorrt-rtx", ["Thread context has not been set!", HARDWARE], BuildOptions()))
    assert message == (
        "g.onnx: compute capability 8.6 does not run format fp8 of this graph (tensorrt-rtx); 8.9 and later do: "
        "omit 8.6, or quantize to int8"
    )
    memory = build_error("g.onnx", "tensorrt", ["IBuilder::x: Error Code 2: out of memory\n"], BuildOptions())
    assert str(memory) == (
        "g.onnx: tensorrt cannot build it: out of memory; use a smaller batch or size, a workspace limit, or a "
        "machine with more memory"
    )
    assert str(build_error("g.onnx", "tensorrt", [], BuildOptions())).endswith("no reason given")
    assert one_line("a\n  b " * 500).count("\n") == 0
