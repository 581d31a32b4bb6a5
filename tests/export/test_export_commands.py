import argparse

import pytest

from compress.checkpoint import save_checkpoint
from export.commands import add_export_arguments, export_command
from runtime.bundle import load_bundle
from runtime.errors import BadInput


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    return export_command(parser.parse_args([str(word) for word in words]))


def test_export_writes_a_bundle_and_says_what_is_in_it(unet, unet_graph, tmp_path, capsys, monkeypatch):
    # tracing is tested elsewhere, and slow
    monkeypatch.setattr("export.bundle.to_onnx", lambda checkpoint: unet_graph)
    save_checkpoint(unet, tmp_path / "checkpoint")
    assert run(tmp_path / "checkpoint", "--out", tmp_path / "bundle", "--threads", 1) == 0
    said = capsys.readouterr().out
    assert "denoiser.onnx" in said and "MiB" in said and "parity onnxruntime: largest difference" in said
    assert load_bundle(tmp_path / "bundle").manifest["graphs"]["denoiser"]["precision"] == "fp32"


def test_an_output_that_is_something_else_is_refused_before_any_work(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(BadInput, match="notes: exists and is not a bundle"):
        run(tmp_path / "no-such-checkpoint", "--out", tmp_path / "notes")


def test_a_missing_checkpoint_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no-such-checkpoint"):
        run(tmp_path / "no-such-checkpoint", "--out", tmp_path / "bundle")
