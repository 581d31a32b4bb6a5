"""`diffpress bench --engine all`: all installed engines, and one line for each that cannot run the bundle."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import diffpress.runtime.benchmarking.bench
from diffpress.cli.bench import add_arguments
from diffpress.cli.bench import run as run_bench
from diffpress.runtime.benchmarking.probe import Probe
from diffpress.runtime.bundle import MANIFEST, manifest_hash
from diffpress.runtime.engines import ENGINES, available, installed
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError

TINY = Path(__file__).parents[1] / "runtime" / "tiny_bundle"


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_bench(parser.parse_args([str(a) for a in (TINY, "--batch", 2, "--repeats", 1, *arguments)]))


@pytest.fixture(autouse=True)
def probe_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def probe(*arguments: Any) -> Probe:
        calls.append(arguments)
        return Probe(1.0, 2.0)

    monkeypatch.setattr(diffpress.runtime.benchmarking.bench, "probe", probe)
    return calls


@pytest.fixture
def unusable_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise EngineUnavailableError("plan.engine: built for another GPU")

    backend = SimpleNamespace(EXTRA=None, OPTIONS=(), missing=lambda: None, unusable=lambda: None, load=load)
    monkeypatch.setitem(ENGINES, "elsewhere", backend)


def test_all_engines_are_compared_and_an_unusable_one_is_reported(
    unusable_engine: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runnable = [name for name in available() if name != "elsewhere"]
    assert run("--engine", "all", "--baseline", TINY, "--json", tmp_path / "b.json") == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert [row["engine"] for row in found["rows"]] == runnable * 2  # the baseline, then the bundle
    reason = "plan.engine: built for another GPU"
    assert found["left_out"].pop("tiny_bundle in elsewhere") == reason
    # TensorRT may be installed where there is no GPU
    assert set(found["left_out"]) == {f"tiny_bundle in {name}" for name in set(installed()) - set(available())}
    assert f"left out: tiny_bundle in elsewhere: {reason}\n" in capsys.readouterr().out
    assert sorted(found["sampler_overhead"]) == sorted(runnable)


def test_an_engine_requested_by_name_must_be_usable(unusable_engine: None) -> None:
    with pytest.raises(InvalidInputError, match="another GPU"):
        run("--engine", "elsewhere")


def test_options_are_passed_to_the_engines_and_the_probe_processes(
    probe_calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--engine", "onnxruntime", "--threads", 1, "--streams", 2, "--json", tmp_path / "b.json")
    ((_, engine, batch, options),) = probe_calls
    assert (engine, batch, options.threads, options.streams, options.cache) == ("onnxruntime", 2, 1, 2, None)
    with pytest.raises(InvalidInputError, match="engine 'onnxruntime' has no option 'precision'"):
        run("--engine", "onnxruntime", "--precision", "bf16")


def test_the_steps_of_a_cached_plan_are_timed_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(TINY, tmp_path / "cached")
    manifest = json.loads((TINY / MANIFEST).read_text())
    manifest["spec"]["plan"]["cache"] = {"kind": "forecast", "steps": ["full", "forecast"] * 4, "order": 1, "cut": ""}
    (tmp_path / "cached" / MANIFEST).write_text(json.dumps(manifest | {"hash": manifest_hash(manifest)}))
    parser, out = argparse.ArgumentParser(), tmp_path / "bench.json"
    add_arguments(parser)
    words = (tmp_path / "cached", "--engine", "onnxruntime", "--batch", 1, "--json", out)
    assert run_bench(parser.parse_args([str(word) for word in words])) == 0
    line = r"step cache in onnxruntime: 4 full of [0-9.]+ ms, 4 forecast of [0-9.]+ ms, batch 1"
    assert re.search(line, capsys.readouterr().out)
    result = json.loads(out.read_text())
    assert result["step_cache"]["onnxruntime"]["counts"] == {"full": 4, "forecast": 4}
    assert result["rows"][0]["nfe"] == 4
