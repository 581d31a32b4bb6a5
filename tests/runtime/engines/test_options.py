"""The contract of the engines: options that a backend knows, providers in order, and the next where one is not fit."""

from __future__ import annotations

import warnings
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.engines import ENGINES, available, installed, load_engine, open_engine, preferred
from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.engines.onnxruntime import engine as onnxruntime_engine
from diffpress.runtime.engines.onnxruntime.providers import PROVIDERS, in_order
from diffpress.runtime.engines.options import EngineOptions, check_options
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError, plain_warnings
from tests.runtime.small_graphs import sample_inputs

FULL = list(PROVIDERS.values())


@pytest.mark.parametrize(
    ("asked", "there", "names", "absent"),
    [
        ((), FULL, list(PROVIDERS), []),
        ((), ["CPUExecutionProvider", "AzureExecutionProvider"], ["cpu"], []),
        ((), ["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"],
         ["tensorrt", "cuda", "cpu"], []),
        (("cuda",), FULL, ["cuda", "cpu"], []),
        (("cpu", "cuda"), FULL, ["cpu", "cuda"], []),
        (("coreml", "cuda", "coreml"), ["CUDAExecutionProvider"], ["cuda", "cpu"], ["coreml"]),
        (("directml",), ["CPUExecutionProvider"], ["cpu"], ["directml"]),
    ],
)  # fmt: skip
def test_providers_are_tried_in_order_and_the_processor_last(asked, there, names, absent) -> None:
    assert in_order(asked, there) == (names, absent)


def test_a_provider_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidInputError, match="unknown provider 'cudda': did you mean 'cuda'"):
        in_order(["cudda"], FULL)


def loaded(graph: Path, *providers: str) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = load_engine(graph, "onnxruntime", options=EngineOptions(threads=1, providers=providers))
    return engine, [str(warning.message) for warning in caught]


def test_a_provider_that_the_package_has_not_is_passed_over_with_a_warning(float_graph: Path, monkeypatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    plain, silence = loaded(float_graph)
    engine, said = loaded(float_graph, "cuda")
    assert silence == [] and said == ["onnxruntime: this package has no provider 'cuda'; trying cpu"]
    assert plain.device == engine.device == "cpu"
    assert np.array_equal(plain.run(sample_inputs()), engine.run(sample_inputs()))


@pytest.mark.parametrize("way", ["raises", "is dropped without a word"])
def test_a_provider_that_does_not_start_gives_way_to_the_next(float_graph: Path, monkeypatch, way: str, capfd) -> None:
    """As a package for GPUs does on a machine without one: it lists CUDA, and no session with it comes of that."""
    import onnxruntime

    real = onnxruntime.InferenceSession

    def session(path, options, providers, **rest):
        if providers[0] != "CPUExecutionProvider" and way == "raises":
            raise RuntimeError("libcuda.so.1: cannot open shared object file")
        return real(path, options, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: FULL[1:2] + FULL[-1:])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    engine, said = loaded(float_graph)
    (line,) = said
    assert engine.device == "cpu" and line.startswith("onnxruntime: provider 'cuda' fails, trying cpu: ")
    assert ("libcuda" if way == "raises" else "it did not start") in line and "\n" not in line
    assert capfd.readouterr() == ("", "")


def test_streams_of_onnx_runtime_share_the_threads(float_graph: Path) -> None:
    threads = [onnxruntime_engine._threads(EngineOptions(threads=t, streams=s)) for t, s in [(8, 2), (3, 2), (1, 4)]]
    assert threads == [4, 1, 1] and onnxruntime_engine._threads(EngineOptions()) is None
    with (
        closing(load_engine(float_graph, "onnxruntime", options=EngineOptions(threads=2, streams=2))) as two,
        closing(load_engine(float_graph, "onnxruntime", options=EngineOptions(threads=1))) as one,
    ):
        assert np.array_equal(two.run(sample_inputs()), one.run(sample_inputs()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "0 threads"),
        ({"streams": 0}, "0 streams"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        EngineOptions(**options)


def test_an_engine_refuses_what_it_does_not_know_and_a_cache_is_no_demand(tmp_path: Path, float_graph: Path) -> None:
    options = EngineOptions(threads=2, precision="bf16", cache=Cache(tmp_path))
    check_options("e", options, {"threads", "precision"})
    check_options("e", EngineOptions(cache=Cache(tmp_path)), ())
    with pytest.raises(InvalidInputError, match="engine 'onnxruntime' has no option 'precision': leave it out"):
        load_engine(float_graph, "onnxruntime", options=options)


def test_options_survive_json(tmp_path: Path) -> None:
    options = EngineOptions(2, "bf16", 3, Cache(tmp_path), ("cuda", "cpu"))
    assert EngineOptions.from_json(options.to_json()) == options
    assert EngineOptions.from_json({}) == EngineOptions()


def test_every_backend_has_the_names_of_the_contract() -> None:
    for name, backend in ENGINES.items():
        assert backend.EXTRA is None or isinstance(backend.EXTRA, str)
        assert set(backend.OPTIONS) <= set(EngineOptions.__dataclass_fields__), name
        assert all(callable(getattr(backend, function)) for function in ("missing", "unusable", "load")), name
    assert set(available()) <= set(installed()) <= set(ENGINES) and preferred() in ENGINES


@pytest.fixture
def unfit(monkeypatch) -> None:
    """An engine that is preferred, installed, and does not fit."""

    def load(*_: object) -> None:
        raise EngineUnavailableError("plan.engine: built for another GPU")

    backend = SimpleNamespace(EXTRA=None, OPTIONS=(), missing=lambda: None, unusable=lambda: None, load=load)
    others = dict(ENGINES)
    for name in others:
        monkeypatch.delitem(ENGINES, name)
    for name, module in {"elsewhere": backend, **others}.items():
        monkeypatch.setitem(ENGINES, name, module)


def test_where_none_is_asked_for_the_next_engine_is_taken_with_a_warning(unfit, tiny: Path, capsys) -> None:
    assert available()[0] == preferred() == "elsewhere"
    with plain_warnings(), closing(open_engine(load_bundle(tiny))) as engine:
        assert engine.name == available()[1]
    assert capsys.readouterr().err == "warning: plan.engine: built for another GPU; the next engine is tried\n"


def test_an_engine_that_is_asked_for_by_name_has_to_fit(unfit, tiny: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="another GPU"):
        open_engine(load_bundle(tiny), "elsewhere")


def test_where_no_engine_fits_the_last_says_why(unfit, tiny: Path, monkeypatch) -> None:
    for name in available()[1:]:
        monkeypatch.delitem(ENGINES, name)
    with pytest.raises(EngineUnavailableError, match="another GPU"):
        open_engine(load_bundle(tiny))


def test_an_engine_that_this_machine_cannot_run_is_installed_and_not_available(float_graph, monkeypatch) -> None:
    monkeypatch.setattr(ENGINES["onnxruntime"], "unusable", lambda: "there is no GPU")
    assert "onnxruntime" in installed() and "onnxruntime" not in available()
    with pytest.raises(EngineUnavailableError, match="engine 'onnxruntime' cannot run here: there is no GPU"):
        load_engine(float_graph, "onnxruntime")
