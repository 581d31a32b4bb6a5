"""runtime/format_1.py: a format-1 bundle loads and gives exactly the same samples as its format-2 form."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime import generate, load_bundle, open_engine
from diffpress.runtime.bundle import FORMAT, MANIFEST, Bundle, manifest_hash
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.format_1 import upgraded_spec, upgraded_tensor_name
from diffpress.runtime.spec import DenoiserSpec

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format_1"


def resealed(folder: Path, **changes: object) -> Path:
    """Change entries of the bundle's manifest and update its hash."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    manifest["hash"] = manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def samples(bundle: Bundle) -> np.ndarray:
    with closing(open_engine(bundle, "onnxruntime", 1)) as engine:
        return generate(engine, bundle.spec_for(engine.name), seeds=range(4), labels=np.array([0, 1, 2, 0]))


def test_a_format_1_bundle_samples_as_its_format_2_form(tmp_path: Path) -> None:
    old = load_bundle(FIXTURES / "bundle")
    assert old.manifest["format"] == 1 and old.spec.distilled_timesteps and old.spec.plan.output_corrections
    copy = Path(shutil.copytree(FIXTURES / "bundle", tmp_path / "bundle"))
    new = load_bundle(resealed(copy, format=FORMAT, spec=old.spec.to_json(), requires=[]))
    assert new.manifest["format"] == 2 and new.spec == old.spec
    assert np.array_equal(samples(old), samples(new))


def test_a_format_1_bundle_gives_the_samples_recorded_with_diffpress_0_1() -> None:
    recorded, now = np.load(FIXTURES / "bundle_samples.npy"), samples(load_bundle(FIXTURES / "bundle"))
    # processors without VNNI round int8 products differently; on the original processor both are exactly equal
    assert np.abs(recorded - now).max() < 0.2 and np.corrcoef(recorded.ravel(), now.ravel())[0, 1] > 0.99


def test_the_names_of_format_1_are_refused_in_format_2(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FIXTURES / "bundle", tmp_path / "bundle"))
    with pytest.raises(InvalidInputError, match=r"unknown entry '"):
        load_bundle(resealed(copy, format=FORMAT))


def test_every_renamed_entry_of_a_spec_is_upgraded() -> None:
    old = json.loads((FIXTURES / "bundle" / MANIFEST).read_text())["spec"]
    old["plan"]["threshold"] = {"ratio": 0.9, "most": 2.0}
    new = upgraded_spec(old)
    spec = DenoiserSpec.from_json(new)
    assert spec.plan.threshold is not None and spec.plan.threshold.max == 2.0
    assert (spec.spacing.kind, spec.spacing.integer) == (old["spacing"]["grid"], old["spacing"]["whole"])
    assert upgraded_spec(new) == new and upgraded_spec(None) is None and upgraded_spec({}) == {}
    assert upgraded_tensor_name("branch.mid.down") == "svdquant.mid.down" and upgraded_tensor_name("amax.a") == "amax.a"


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        (["step_caching"], "requires step_caching, which this diffpress does not support"),
        (["b", "a"], "requires a, b"),
        ("all", "does not support"),
    ],
)
def test_a_bundle_that_requires_an_unknown_feature_is_refused_by_name(
    requires: object, message: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(FIXTURES / "bundle", tmp_path / "bundle"))
    with pytest.raises(InvalidInputError, match=message):
        load_bundle(resealed(copy, requires=requires))


@pytest.mark.parametrize("number", [0, 3, "2", None])
def test_other_formats_are_refused_with_the_supported_ones(number: object, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FIXTURES / "bundle", tmp_path / "bundle"))
    with pytest.raises(InvalidInputError, match="this diffpress reads 1 and 2"):
        load_bundle(resealed(copy, format=number))
