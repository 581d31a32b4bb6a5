"""OpenVINO options: the cache does not change results, precision depends on the CPU, several streams."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.engines import load_engine, open_engine
from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import EngineUnavailableError
from diffpress.runtime.sampler import generate
from tests.runtime.small_graphs import sample_inputs

openvino = pytest.importorskip("openvino")


@pytest.fixture
def cached(tmp_path: Path) -> EngineOptions:
    return EngineOptions(threads=1, cache=Cache(tmp_path / "cache", "these bytes"))


def no_compiling(self: object, *_: object) -> None:
    raise AssertionError("expected a cache hit")


@pytest.fixture(params=["float", "quantized"])
def graph(request: pytest.FixtureRequest, float_graph: Path, quantized_graph: Callable[..., Path]) -> Path:
    return float_graph if request.param == "float" else quantized_graph("Conv", "MatMul", "Gemm")


def ran(graph: Path, options: EngineOptions) -> tuple[np.ndarray, object]:
    with closing(load_engine(graph, "openvino", options=options)) as engine:
        return engine.run(sample_inputs()), engine.precision_report(sample_inputs())


def test_a_cached_model_gives_the_same_bits_and_the_same_precision_report(
    graph: Path, cached: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    without, first = ran(graph, replace(cached, cache=None)), ran(graph, cached)
    monkeypatch.setattr(openvino.Core, "compile_model", no_compiling)
    second = ran(graph, cached)
    assert np.array_equal(without[0], first[0]) and np.array_equal(without[0], second[0])
    assert without[1] == first[1] == second[1]


def test_a_cached_model_is_loaded_without_reading_the_graph(
    graph: Path, cached: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(load_engine(graph, "openvino", options=cached)) as engine:
        inputs, expected = engine.inputs, engine.run(sample_inputs())
    monkeypatch.setattr(openvino.Core, "read_model", no_compiling)
    with closing(load_engine(graph, "openvino", options=cached)) as engine:
        assert engine.inputs == inputs and np.array_equal(engine.run(sample_inputs()), expected)


@pytest.mark.parametrize("change", ["graph", "threads", "streams", "shapes", "version", "processor"])
def test_everything_the_compiled_model_depends_on_is_part_of_the_key(
    float_graph: Path, cached: EngineOptions, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    assert cached.cache is not None
    ran(float_graph, cached)
    folder, inputs, options = cached.cache.folder, sample_inputs(), cached
    before = set(folder.iterdir())
    if change == "graph":
        options = replace(cached, cache=cached.cache.of("other bytes"))
    elif change == "shapes":
        inputs = {"sample": inputs["sample"][:1]}
    elif change == "version":
        versions = openvino.Core().get_versions("CPU")["CPU"]
        other = {"CPU": type("Version", (), {"build_number": versions.build_number + "x"})}
        monkeypatch.setattr(openvino.Core, "get_versions", lambda *_: other)
    elif change == "processor":
        monkeypatch.setattr(openvino.Core, "get_property", lambda *_: "another processor")
    else:
        changed: dict[str, Any] = {change: 2}
        options = replace(cached, **changed)
    with closing(load_engine(float_graph, "openvino", options=options)) as engine:
        engine.run(inputs)
    added = set(folder.iterdir()) - before
    assert len(added) == (
        1 if change == "shapes" else 2
    )  # the tensor description, which does not depend on shapes, and the model


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_damaged_entries_are_replaced(graph: Path, cached: EngineOptions, damage: Callable[[bytes], bytes]) -> None:
    expected = ran(graph, cached)[0]
    assert cached.cache is not None
    files = sorted(cached.cache.folder.iterdir())
    sound = [file.read_bytes() for file in files]
    for file, content in zip(files, sound, strict=True):
        file.write_bytes(damage(content))
    assert np.array_equal(ran(graph, cached)[0], expected)
    assert all(len(file.read_bytes()) > 0.9 * len(content) for file, content in zip(files, sound, strict=True))


def test_an_entry_that_openvino_rejects_is_compiled_again(
    float_graph: Path, cached: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is valid, but OpenVINO cannot import the data."""
    real = openvino.Core.import_model
    expected = ran(float_graph, cached)[0]
    seen = []

    def import_garbage(self: Any, stream: Any, *rest: Any) -> Any:
        seen.append(stream)
        return real(self, io.BytesIO(b"no model"), *rest)

    monkeypatch.setattr(openvino.Core, "import_model", import_garbage)
    assert np.array_equal(ran(float_graph, cached)[0], expected) and seen


def test_a_bundle_is_cached_under_its_hash_and_is_not_modified(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(threads=1, cache=Cache(tmp_path / "cache"))

    def images(folder: Path) -> np.ndarray:
        bundle = load_bundle(folder)
        with closing(open_engine(bundle, "openvino", options=options)) as engine:
            return generate(engine, bundle.spec, range(3))

    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    first = images(tiny)
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before
    monkeypatch.setattr(openvino.Core, "compile_model", no_compiling)
    assert np.array_equal(images(Path(shutil.copytree(tiny, tmp_path / "elsewhere"))), first)


def test_a_precision_the_cpu_does_not_support_raises_a_one_line_error(
    float_graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = openvino.Core.get_property

    def incapable(self: Any, device: str, name: str, *rest: Any) -> Any:
        return ["FP32", "INT8"] if name == "OPTIMIZATION_CAPABILITIES" else real(self, device, name, *rest)

    monkeypatch.setattr(openvino.Core, "get_property", incapable)
    with pytest.raises(EngineUnavailableError, match="does not support precision bf16; use fp32") as caught:
        load_engine(float_graph, "openvino", options=EngineOptions(precision="bf16"))
    assert "\n" not in str(caught.value)


def test_a_precision_the_cpu_supports_is_passed_to_openvino(float_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The capabilities are patched, so the test does not depend on this CPU."""
    real, hints = openvino.Core.get_property, []

    def capable(self: Any, device: str, name: str, *rest: Any) -> Any:
        return ["FP32", "BF16"] if name == "OPTIMIZATION_CAPABILITIES" else real(self, device, name, *rest)

    def compiling(self: Any, model: Any, device: str, properties: dict[str, Any]) -> Any:
        hints.append(properties["INFERENCE_PRECISION_HINT"])
        return real_compile(self, model, device, properties)

    real_compile = openvino.Core.compile_model
    monkeypatch.setattr(openvino.Core, "get_property", capable)
    monkeypatch.setattr(openvino.Core, "compile_model", compiling)
    for precision in ("bf16", "fp32"):
        load_engine(float_graph, "openvino", options=EngineOptions(precision=precision)).run(sample_inputs())
    assert hints == ["bf16", "f32"]


def test_concurrent_streams_return_the_same_outputs_as_one_stream(graph: Path) -> None:
    options = EngineOptions(threads=2, streams=2)
    inputs = [sample_inputs(seed) for seed in range(12)]
    with (
        closing(load_engine(graph, "openvino", options=options)) as several,
        closing(load_engine(graph, "openvino", options=EngineOptions(threads=2))) as one,
        ThreadPoolExecutor(4) as pool,  # more callers than requests, so some wait
    ):
        found = list(pool.map(several.run, inputs))
        assert all(np.array_equal(a, one.run(b)) for a, b in zip(found, inputs, strict=True))


def test_the_tensor_description_in_the_cache_is_plain_json(float_graph: Path, cached: EngineOptions) -> None:
    assert cached.cache is not None
    load_engine(float_graph, "openvino", options=cached)
    (file,) = cached.cache.folder.iterdir()
    described = {"inputs": {"sample": "float32"}, "outputs": ["out_sample"], "shapes": {}}
    assert json.loads(file.read_bytes()[32:]) == described
