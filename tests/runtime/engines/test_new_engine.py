"""Adding an engine: one module and one line in ENGINES make it sample, benchmark and report like the others."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from diffpress.runtime.benchmarking.bench import bundle_subject, measure
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.engines import ENGINES, available, load_engine, open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampler import generate
from tests.runtime.engines import reference_engine

pytest.importorskip("onnx")


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(ENGINES, "reference", reference_engine)
    return reference_engine


def test_it_samples_the_same_images_as_onnxruntime(tiny: Path) -> None:
    bundle = load_bundle(tiny)
    found, expected = (
        generate(open_engine(bundle, name), bundle.spec, range(3)) for name in ("reference", "onnxruntime")
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with Pipeline(bundle, "reference") as pipe:
        assert pipe.denoiser.name == "reference" and len(pipe(seeds=range(2))) == 2


def test_it_is_listed_last_and_can_be_benchmarked(tiny: Path) -> None:
    assert available()[-1] == "reference"
    bundle = load_bundle(tiny)
    (row,) = measure([bundle_subject(bundle, open_engine(bundle, "reference"))], batches=(1,), repeats=1)["rows"]
    assert row["engine"] == "reference" and row["integer_mac_share"] is None


def test_options_it_does_not_list_are_refused(tiny: Path) -> None:
    with pytest.raises(InvalidInputError, match="engine 'reference' has no option 'threads'"):
        load_engine(tiny / "denoiser.onnx", "reference", options=EngineOptions(threads=2))
