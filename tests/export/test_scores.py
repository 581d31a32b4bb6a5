"""export/scores.py: the scores of a run's two bundles are stored, and measured again if what they depend on changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffpress.compress.config import EvaluateConfig
from diffpress.export.scores import evaluate_bundles
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.pipeline import Pipeline


def test_scores_are_stored_and_reused_until_a_file_they_read_changes(
    sd_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="diffpress")
    prompts, stored = tmp_path / "prompts.txt", tmp_path / "evaluation.json"
    config = EvaluateConfig(samples=8, seeds=1, batch=8, prompts=prompts)
    with Pipeline(load_bundle(sd_bundle), threads=1) as ours, Pipeline(load_bundle(sd_bundle), threads=1) as theirs:
        for text, measured in (("a red cat", True), ("a red cat", False), ("a dog", True)):
            prompts.write_text(text, encoding="utf-8")
            caplog.clear()
            found = evaluate_bundles(ours, theirs, config, stored)
            assert ("done before" not in caplog.text) == measured
            assert json.loads(stored.read_text()) == json.loads(json.dumps(found))
    assert found["bundle"]["paired"]["psnr_db"] > 80.0 and found["bundle"]["frechet"] is None
