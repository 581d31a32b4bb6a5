"""`diffpress export`: dtype, size and output folder."""

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

from diffpress.cli.export import add_arguments
from diffpress.cli.export import run as export_command
from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.export.graph.model import Graph
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.errors import GateFailedError, InvalidInputError
from diffpress.runtime.spec import DenoiserSpec


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return export_command(parser.parse_args([str(word) for word in words]))


def test_export_writes_a_bundle_and_lists_its_content(
    unet: Checkpoint,
    unet_graph: Graph,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # tracing is slow and tested elsewhere
    monkeypatch.setattr("diffpress.export.denoiser.to_onnx", lambda *_: unet_graph)
    save_checkpoint(unet, tmp_path / "checkpoint")
    assert run(tmp_path / "checkpoint", "--out", tmp_path / "bundle", "--threads", 1) == 0
    output = capsys.readouterr().out
    assert "denoiser.onnx" in output and "MiB" in output
    assert "parity onnxruntime: 16 samples, 4 steps, largest difference" in output
    assert load_bundle(tmp_path / "bundle").manifest["graphs"]["denoiser"]["precision"] == "fp32"


def test_the_parity_bound_of_the_command_replaces_the_built_in_one_and_keeps_the_bundle(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.export.denoiser.to_onnx", lambda *_: unet_graph)
    save_checkpoint(unet, tmp_path / "checkpoint")
    words = (tmp_path / "checkpoint", "--out", tmp_path / "bundle", "--threads", 1, "--parity-sqnr-db")
    with pytest.raises(GateFailedError, match=r"199 dB are required by parity_sqnr_db.*The bundle is kept"):
        run(*words, 199)
    assert load_bundle(tmp_path / "bundle").manifest["parity_failures"][0]["required_db"] == 199.0
    assert run(*words, -5) == 0 and "parity_failures" not in load_bundle(tmp_path / "bundle").manifest


@pytest.mark.parametrize(
    ("words", "dtype", "size", "fixed"),
    [
        ((), torch.float32, (8, 8), False),
        (("--dtype", "bf16"), torch.bfloat16, (8, 8), False),
        (("--size", "16x24"), torch.float32, (16, 24), True),
        (("--size", "8x8"), torch.float32, (8, 8), True),
    ],
)
def test_dtype_and_size_match_the_arguments(
    words: tuple[str, ...],
    dtype: torch.dtype,
    size: tuple[int, int],
    fixed: bool,
    unet: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class StopError(Exception):
        pass

    def trace(model: nn.Module, spec: DenoiserSpec, fixed_size: bool) -> None:
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert spec.image_size == size and fixed_size == fixed
        raise StopError

    monkeypatch.setattr("diffpress.export.denoiser.to_onnx", trace)
    save_checkpoint(unet, tmp_path / "checkpoint")
    with pytest.raises(StopError):
        run(tmp_path / "checkpoint", "--out", tmp_path / "bundle", *words)


@pytest.mark.parametrize(("size", "message"), [("16", "as in 512x768"), ("0x8", "nearest"), ("-8x8", "as in 512x768")])
def test_an_invalid_size_is_refused(size: str, message: str, unet: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(unet, tmp_path / "checkpoint")
    with pytest.raises(InvalidInputError, match=message):
        run(tmp_path / "checkpoint", "--out", tmp_path / "bundle", f"--size={size}")


def test_an_output_path_that_is_not_a_bundle_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InvalidInputError, match="notes: exists and is not a bundle"):
        run(tmp_path / "no-such-checkpoint", "--out", tmp_path / "notes")


def test_a_missing_checkpoint_is_invalid_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no-such-checkpoint"):
        run(tmp_path / "no-such-checkpoint", "--out", tmp_path / "bundle")
