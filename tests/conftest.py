"""Fixtures that several test folders share; heavy packages are imported only inside the fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny pipeline (tests/pipelines.py), created once per kind; do not modify. Skips without torch.

    A function that builds a pipeline is given with the name of its folder.
    """
    pytest.importorskip("torch")
    made: dict[str, Path] = {}

    def folder(kind: str | Callable[[], Any], name: str | None = None) -> Path:
        from tests.pipelines import tiny_pipeline

        key = name or str(kind)
        if key not in made:
            made[key] = tiny_pipeline(kind, tmp_path_factory.mktemp(key) / key)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def sd_bundle(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of the tiny Stable Diffusion for both engines, with dynamic height and width; do not modify."""
    from diffpress.cli.main import main

    out = tmp_path_factory.mktemp("exported") / "sd"
    words = ("export", tiny_folder("sd"), "--out", out, "--targets", "onnx", "openvino", "--threads", 1)
    assert main([str(word) for word in words]) == 0
    return out
