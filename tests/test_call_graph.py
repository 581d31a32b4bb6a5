"""A checkpoint passes few files: who receives it, in quantize and in export, and how often it comes back to one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import diffpress
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.export.bundle import export_bundle
from diffpress.export.graph.to_onnx import to_onnx
from tests.compress.conftest import make_unet

PACKAGE = Path(diffpress.__file__).parent
MOST_FILES = MOST_RETURNS = 15


@contextmanager
def checkpoint_path() -> Iterator[list[str]]:
    """Collect the files of the functions that receive a checkpoint, one entry for each change of file."""
    path: list[str] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if names[:1] != ("self",) and any(isinstance(frame.f_locals.get(name), Checkpoint) for name in names):
            file = Path(code.co_filename).relative_to(PACKAGE).as_posix()
            if path[-1:] != [file]:
                path.append(file)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield path
    finally:
        sys.setprofile(before)


def assert_readable(path: list[str], start: str) -> None:
    files = list(dict.fromkeys(path))
    assert files[0] == start
    assert len(files) <= MOST_FILES, files
    assert len(path) - len(files) <= MOST_RETURNS, path


@pytest.mark.parametrize(
    "methods",
    [
        {},
        {"format": "w4a8", "awq": True, "gptq": {"samples": 2}, "qat": {"steps": 1, "warmup": 0, "trajectories": 2}},
        {"smoothquant": True, "split_concats": True, "svdquant": {"rank": 2}},
    ],
    ids=str,
)
def test_quantize(methods: dict[str, Any], tmp_path: Path) -> None:
    unet, config = make_unet(classes=4), QuantizeConfig(**{"samples": 2, "batch": 2, **methods})
    with checkpoint_path() as path:
        quantize(unet, config, Context(0, tmp_path, unet))
    assert_readable(path, "compress/quantization/quantize.py")


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet(classes=4)
    quantized = quantize(unet, QuantizeConfig(samples=2, batch=2), Context(0, tmp_path, unet))
    traced = to_onnx(unet.model, unet.spec)  # before, since a profiler slows the tracing
    monkeypatch.setattr("diffpress.export.denoiser.to_onnx", lambda *_: traced)
    with checkpoint_path() as path:
        export_bundle(quantized, tmp_path / "bundle")
    assert_readable(path, "export/bundle.py")
