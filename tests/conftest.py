"""What several folders of tests share; nothing heavy is imported before a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Callable[..., Path]:
    """The folder of a tiny pipeline (tests/pipelines.py), made once for each kind; not to be changed."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        from tests.pipelines import tiny_pipeline

        if kind not in made:
            made[kind] = tiny_pipeline(kind, tmp_path_factory.mktemp(kind) / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def sd_bundle(tiny_folder, tmp_path_factory) -> Path:
    """The tiny Stable Diffusion as a bundle for both engines, its height and width open; not to be changed."""
    from diffpress.cli.main import main

    out = tmp_path_factory.mktemp("exported") / "sd"
    words = ("export", tiny_folder("sd"), "--out", out, "--targets", "onnx", "openvino", "--threads", 1)
    assert main([str(word) for word in words]) == 0
    return out
