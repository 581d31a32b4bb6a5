"""Engine options, the order of ONNX Runtime providers, and the fallback to the next engine."""

from __future__ import annotations

import logging
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
from diffpress.runtime.engines.onnxruntime.providers import PROVIDERS, provider_order
from diffpress.runtime.engines.options import EngineOptions, check_options
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError
from tests.runtime.small_graphs import sample_inputs

FULL = list(PROVIDERS.values())


@pytest.mark.parametrize(
    ("requested", "available", "names", "missing"),
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
def test_providers_are_tried_in_order_and_the_cpu_last(
    requested: tuple[str, ...], available: list[str], names: list[str], missing: list[str]
) -> None:
    assert provider_order(requested, available) == (names, missing)


def test_an_unknown_provider_raises() -> None:
    with pytest.raises(InvalidInputError, match="unknown provider 'cudda': did you mean 'cuda'"):
        provider_order(["cudda"], FULL)


def loaded(graph: Path, *providers: str) -> Any:
    return load_engine(graph, "onnxruntime", options=EngineOptions(threads=1, providers=providers))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_provider_missing_from_the_package_is_skipped_with_a_warning(
    float_graph: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    default = loaded(float_graph)
    assert warnings_of(caplog) == []
    engine = loaded(float_graph, "cuda")
    assert warnings_of(caplog) == ["onnxruntime: this package has no provider 'cuda'; trying cpu"]
    assert default.device == engine.device == "cpu"
    assert np.array_equal(default.run(sample_inputs()), engine.run(sample_inputs()))


@pytest.mark.parametrize("failure", ["raises", "is dropped silently"])
def test_a_provider_that_fails_is_replaced_by_the_next(
    float_graph: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A GPU package on a machine without a GPU lists CUDA, but cannot create a session with it."""
    import onnxruntime

    real = onnxruntime.InferenceSession

    def session(path: str, options: Any, providers: list[str], **rest: Any) -> Any:
        if providers[0] != "CPUExecutionProvider" and failure == "raises":
            raise RuntimeError("libcuda.so.1: cannot open shared object file")
        return real(path, options, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: FULL[1:2] + FULL[-1:])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    engine = loaded(float_graph)
    (line,) = warnings_of(caplog)
    assert engine.device == "cpu" and line.startswith("onnxruntime: provider 'cuda' failed, trying cpu: ")
    assert ("libcuda" if failure == "raises" else "it did not start") in line and "\n" not in line
    assert capfd.readouterr() == ("", "")


def test_onnx_runtime_streams_share_the_threads(float_graph: Path) -> None:
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
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        EngineOptions(**options)


def test_the_former_names_of_precisions_become_the_present_ones_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert [EngineOptions(precision=name).precision for name in ("f32", "f16", "bf16")] == ["fp32", "fp16", "bf16"]
    assert EngineOptions.from_json({"precision": "f32"}) == EngineOptions()
    assert warnings_of(caplog)[:2] == [
        "precision f32 is now fp32; the old name works until diffpress 0.4",
        "precision f16 is now fp16; the old name works until diffpress 0.4",
    ]


def test_unsupported_options_raise_and_a_cache_is_always_accepted(tmp_path: Path, float_graph: Path) -> None:
    options = EngineOptions(threads=2, precision="bf16", cache=Cache(tmp_path))
    check_options("e", options, {"threads", "precision"})
    check_options("e", EngineOptions(cache=Cache(tmp_path)), ())
    with pytest.raises(InvalidInputError, match="engine 'onnxruntime' has no option 'precision': omit it"):
        load_engine(float_graph, "onnxruntime", options=options)


def test_options_round_trip_through_json(tmp_path: Path) -> None:
    options = EngineOptions(2, "bf16", 3, Cache(tmp_path), ("cuda", "cpu"))
    assert EngineOptions.from_json(options.to_json()) == options
    assert EngineOptions.from_json({}) == EngineOptions()


def test_every_backend_defines_the_required_names() -> None:
    for name, backend in ENGINES.items():
        assert backend.EXTRA is None or isinstance(backend.EXTRA, str)
        assert set(backend.OPTIONS) <= set(EngineOptions.__dataclass_fields__), name
        assert all(callable(getattr(backend, function)) for function in ("missing", "unusable", "load")), name
    assert set(available()) <= set(installed()) <= set(ENGINES) and preferred() in ENGINES


@pytest.fixture
def unavailable_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register an engine that is preferred and installed, but unavailable when loaded."""

    def load(*_: object) -> None:
        raise EngineUnavailableError("plan.engine: built for another GPU")

    backend = SimpleNamespace(EXTRA=None, OPTIONS=(), missing=lambda: None, unusable=lambda: None, load=load)
    others = dict(ENGINES)
    for name in others:
        monkeypatch.delitem(ENGINES, name)
    for name, module in {"elsewhere": backend, **others}.items():
        monkeypatch.setitem(ENGINES, name, module)


def test_without_a_named_engine_the_next_one_is_used_with_a_warning(
    unavailable_engine: None, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert available()[0] == preferred() == "elsewhere"
    with closing(open_engine(load_bundle(tiny))) as engine:
        assert engine.name == available()[1]
    assert warnings_of(caplog) == ["plan.engine: built for another GPU; trying the next engine"]


def test_a_named_engine_that_is_unavailable_raises(unavailable_engine: None, tiny: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="another GPU"):
        open_engine(load_bundle(tiny), "elsewhere")


def test_if_no_engine_is_available_the_last_error_is_raised(
    unavailable_engine: None, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in available()[1:]:
        monkeypatch.delitem(ENGINES, name)
    with pytest.raises(EngineUnavailableError, match="another GPU"):
        open_engine(load_bundle(tiny))


def test_an_engine_this_machine_cannot_run_is_installed_but_not_available(
    float_graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ENGINES["onnxruntime"], "unusable", lambda: "there is no GPU")
    assert "onnxruntime" in installed() and "onnxruntime" not in available()
    with pytest.raises(EngineUnavailableError, match="engine 'onnxruntime' cannot run here: there is no GPU"):
        load_engine(float_graph, "onnxruntime")
