"""How the bundles of a server are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.serve.models import Model, Source, parsed_source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("work/bundle", Source(Path("work/bundle"))),
        ("icons=work", Source(Path("work"), "icons")),
        ("a=b=c", Source(Path("b=c"), "a")),
        ("a=work@onnxruntime", Source(Path("work"), "a", "onnxruntime")),
        ("work@openvino", Source(Path("work"), None, "openvino")),
        ("work@2", Source(Path("work@2"))),
    ],
)
def test_a_bundle_is_named_with_its_model_and_engine(text: str, source: Source) -> None:
    assert parsed_source(text) == source


@pytest.mark.parametrize("text", ["", "=work", "default=work", "a=", "a=@openvino"])
def test_a_bundle_without_name_or_path_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="give a bundle as PATH"):
        parsed_source(text)


def test_a_model_is_called_like_its_folder_or_that_of_its_run(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "icons" / "bundle")
    for path in (tmp_path / "icons", tmp_path / "icons" / "bundle"):
        assert Model(Source(path), EngineOptions(), 8).name == "icons"
    assert Model(Source(tiny), EngineOptions(), 8).name == "tiny_bundle"
