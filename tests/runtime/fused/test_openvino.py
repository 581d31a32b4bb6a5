"""runtime/fused/openvino.py: fused sampling gives the samples of the sampler's loop."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.engines import Engine, load_engine, open_engine
from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.engines.openvino.engine import OpenVinoEngine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.fused import fused_only, step_by_step
from diffpress.runtime.fused.openvino import run_fused
from diffpress.runtime.fused.program import fused_program
from diffpress.runtime.sampler import generate, warm_up
from diffpress.runtime.sampling_plan import OutputCorrection
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.fused_specs import CLASSES, ONE_EVALUATION, SHAPE, spec_of

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nonlinear network of sample, timestep and label, saved as OpenVINO IR."""
    from openvino import opset13 as op

    def parameter(name: str, shape: list[int], kind: type) -> object:
        node = op.parameter(shape, kind, name=name)
        node.output(0).set_names({name})
        return node

    sample = parameter("sample", [-1, *SHAPE], np.float32)
    timestep, labels = parameter("timestep", [-1], np.float32), parameter("class_labels", [-1], np.int64)
    each = np.array([-1, 1, 1, 1])
    cond = op.add(op.multiply(timestep, np.float32(1e-3)), op.multiply(op.convert(labels, "f32"), np.float32(0.2)))
    filters = op.constant(np.random.default_rng(0).standard_normal((2, 2, 3, 3)).astype(np.float32) * 0.3)
    convolved = op.convolution(sample, filters, [1, 1], [1, 1], [1, 1], [1, 1])
    out = op.tanh(op.add(convolved, op.reshape(cond, each, False)))
    out.output(0).set_names({"out_sample"})
    model = openvino.Model([op.result(out)], [sample, timestep, labels], "nonlinear")
    path = tmp_path_factory.mktemp("fused") / "nonlinear.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


@pytest.fixture(scope="module")
def engine(graph: Path) -> Iterator[OpenVinoEngine]:
    with closing(load_engine(graph, "openvino", threads=1)) as engine:
        assert isinstance(engine, OpenVinoEngine)
        yield engine


classes_spec = partial(spec_of, prediction="v", conditioning=CLASSES)


def both(engine: Engine, spec: DenoiserSpec, count: int = 3, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    networks = (step_by_step(engine), fused_only(engine))
    expected, found = (generate(network, spec, range(count), batch=batch) for network in networks)
    return expected, found


@pytest.mark.parametrize("solver", ONE_EVALUATION)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("clip", [True, False])
def test_fused_sampling_equals_the_loop(engine: OpenVinoEngine, solver: str, guidance: float, clip: bool) -> None:
    if solver == "ddim_clip" and clip:
        pytest.skip("ddim_clip clips x_0 itself")
    expected, found = both(engine, classes_spec(solver, guidance=guidance, clip=clip))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_output_corrections_are_per_channel(engine: OpenVinoEngine, prediction: str) -> None:
    output_corrections = tuple(OutputCorrection(0.01 * i - 0.03, (0.02 * i, -0.1)) for i in range(9))
    spec = classes_spec("unipc_3", prediction=prediction, output_corrections=output_corrections)
    expected, found = both(engine, spec)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(both(engine, spec.with_plan(spec.plan.without_corrections))[1] - found).max() > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_any_number_of_steps_runs_in_the_same_graph(
    engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    both(engine, classes_spec("ddim"))

    def no_compiling(*_: object) -> None:
        raise AssertionError("compiled twice")

    monkeypatch.setattr(engine, "_compile", no_compiling)
    expected, found = both(engine, classes_spec("dpmpp_3m", steps=steps, clip=False))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_run_does_not_depend_on_the_previous_one_or_overwrite_its_samples(engine: OpenVinoEngine) -> None:
    spec = classes_spec("unipc_2")
    first = generate(fused_only(engine), spec, range(2))
    copied = first.copy()
    other = generate(fused_only(engine), spec, range(2, 4))
    assert np.array_equal(first, copied) and np.abs(other - first).max() > 0.1
    assert np.array_equal(generate(fused_only(engine), spec, range(2)), first)


def test_the_bundles_exact_denoiser_gives_the_same_images(tiny: Path) -> None:
    bundle = load_bundle(tiny)
    with closing(open_engine(bundle, "openvino", threads=1)) as engine:
        expected, found = both(engine, bundle.spec, count=6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_concurrent_runs_equal_sequential_ones(graph: Path, engine: OpenVinoEngine) -> None:
    spec, seeds = classes_spec("unipc_2"), [range(first, first + 2) for first in range(12)]
    options = EngineOptions(threads=2, streams=2)
    with closing(load_engine(graph, "openvino", options=options)) as several, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch_seeds: generate(fused_only(several), spec, batch_seeds), seeds))
    for batch_seeds, samples in zip(seeds, found, strict=True):
        assert np.array_equal(samples, generate(fused_only(engine), spec, batch_seeds))


def test_the_cache_also_stores_the_fused_graph(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, spec = EngineOptions(threads=1, cache=Cache(tmp_path, "nonlinear")), classes_spec("unipc_2", guidance=2.0)

    def samples() -> tuple[np.ndarray, np.ndarray]:
        with closing(load_engine(graph, "openvino", options=options)) as engine:
            return both(engine, spec, count=2)

    first = samples()
    assert len(list(tmp_path.iterdir())) == 3  # tensor description, network, fused graph

    def no_reading(*_: object) -> None:
        raise AssertionError("expected a cache hit")

    monkeypatch.setattr(openvino.Core, "read_model", no_reading)
    assert all(np.array_equal(a, b) for a, b in zip(first, samples(), strict=True))


def test_with_the_network_in_bfloat16_the_steps_stay_in_float32(graph: Path, engine: OpenVinoEngine) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU does not support bfloat16")
    spec = classes_spec("unipc_3", steps=20)
    with closing(load_engine(graph, "openvino", options=EngineOptions(threads=1, precision="bf16"))) as half:
        expected, found = both(half, spec, count=6)
    exact = generate(step_by_step(engine), spec, range(6))
    assert np.abs(expected - exact).max() > 1e-3  # the network is in bfloat16
    # samples rounded to bfloat16 at each step would deviate as much again
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected - exact).max()


def test_fp16_is_run_by_the_loop(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = openvino.Core.get_property

    def capable(self: Any, device: str, name: str, *rest: Any) -> Any:
        return ["FP32", "FP16"] if name == "OPTIMIZATION_CAPABILITIES" else real(self, device, name, *rest)

    monkeypatch.setattr(openvino.Core, "get_property", capable)
    program, cond = fused_program(classes_spec("ddim")), {"class_labels": np.arange(2)}
    with closing(load_engine(graph, "openvino", options=EngineOptions(precision="fp16"))) as half:
        assert isinstance(half, OpenVinoEngine) and program is not None
        assert run_fused(half, program, cond, np.zeros((2, *SHAPE), np.float32)) is None


def test_large_networks_are_run_by_the_loop(engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    program, cond, start = fused_program(classes_spec("ddim")), {"class_labels": np.arange(2)}, np.zeros((2, *SHAPE))
    assert program is not None
    found = run_fused(engine, program, cond, start)
    assert found is not None and found.shape == start.shape
    monkeypatch.setattr("diffpress.runtime.fused.openvino.MAX_GRAPH_BYTES", 10)
    assert run_fused(engine, program, cond, start) is None


def test_warm_up_compiles_what_sampling_then_runs(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    real = openvino.Core.compile_model

    def compiling(self: Any, model: Any, *rest: Any) -> Any:
        compiled.append(model.get_friendly_name())
        return real(self, model, *rest)

    monkeypatch.setattr(openvino.Core, "compile_model", compiling)
    with closing(load_engine(graph, "openvino", threads=1)) as engine:
        for solver, expected in (("ddim", ["fused"]), ("heun", ["fused", "nonlinear"])):
            warm_up(engine, classes_spec(solver), 3)
            assert compiled == expected
            generate(engine, classes_spec(solver), range(3))
            assert compiled == expected


def test_shapes_the_graph_cannot_take_raise_a_one_line_error(engine: OpenVinoEngine) -> None:
    program = fused_program(classes_spec("ddim"))
    assert program is not None
    with pytest.raises(InvalidInputError, match="OpenVINO cannot compile it") as caught:
        run_fused(engine, program, {"class_labels": np.arange(2)}, np.zeros((2, 3, 3, 4), np.float32))
    assert "\n" not in str(caught.value)


FORECASTS = ("full", "full", "forecast", "forecast", "full", "forecast", "full", "forecast", "forecast")


@pytest.mark.parametrize(
    ("solver", "order", "guidance"),
    [*((solver, 1, 3.0) for solver in ONE_EVALUATION), ("unipc_3", 0, 1.0), ("unipc_3", 2, 1.0)],
)
def test_fused_sampling_with_forecasts_equals_the_loop(
    engine: OpenVinoEngine, solver: str, order: int, guidance: float
) -> None:
    spec = classes_spec(solver, guidance=guidance, cache=StepCache("forecast", FORECASTS, order))
    expected, found = both(engine, spec)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    uncached = generate(step_by_step(engine), spec, range(3), plan=spec.plan.without_cache)
    assert np.abs(found - uncached).max() > 1e-3


def test_output_corrections_apply_to_forecasts(engine: OpenVinoEngine) -> None:
    output_corrections = tuple(OutputCorrection(0.01 * i - 0.03, (0.02 * i, -0.1)) for i in range(9))
    cache = StepCache("forecast", FORECASTS, 1)
    expected, found = both(engine, classes_spec("unipc_3", output_corrections=output_corrections, cache=cache))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_cache_of_full_steps_runs_the_same_graph_and_gives_the_same_bits(
    engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = classes_spec("dpmpp_2m")
    expected = generate(fused_only(engine), spec, range(3))
    full = replace(spec.plan, cache=StepCache("forecast", ("full",) * 9, order=2))
    monkeypatch.setattr(engine, "_compile", None)
    assert np.array_equal(generate(fused_only(engine), spec, range(3), plan=full), expected)


def test_a_forecast_runs_no_inference(engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = classes_spec("ddim", cache=StepCache("forecast", FORECASTS, 1))
    generate(fused_only(engine), spec, range(3))
    ran = []
    with engine.reserved(*_fused_key(engine)) as sampling:
        real = sampling._requests
        wrapped = [SimpleNamespace(infer=lambda request=r, **k: ran.append(request.infer(**k))) for r in real]
        monkeypatch.setattr(sampling, "_requests", wrapped)
    generate(fused_only(engine), spec, range(3))
    assert len(ran) == FORECASTS.count("full")


def _fused_key(engine: OpenVinoEngine) -> tuple[Any, Any]:
    """The shapes and variant of the graph that was compiled last."""
    shapes, key = list(engine._compiled)[-1]
    return shapes, SimpleNamespace(key=key)


def test_warm_up_compiles_what_a_cached_plan_runs(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = classes_spec("ddim", cache=StepCache("forecast", FORECASTS, 1))
    with closing(load_engine(graph, "openvino", threads=1)) as engine:
        assert isinstance(engine, OpenVinoEngine)
        warm_up(engine, spec, 3)
        monkeypatch.setattr(engine, "_compile", None)
        generate(fused_only(engine), spec, range(3))
