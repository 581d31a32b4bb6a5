"""compress/evaluation/torch_baseline.py: how the PyTorch baseline is sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.evaluation.torch_baseline import torch_subject


def test_the_baseline_keeps_the_guidance_of_the_plan(unet_with: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = unet_with(classes=4)
    conditioning = replace(checkpoint.spec.conditioning, null_label=3)
    plan = replace(checkpoint.spec.plan, guidance=2.0)
    spec = replace(checkpoint.spec, conditioning=conditioning, plan=plan)
    save_checkpoint(checkpoint.evolve(spec=spec), tmp_path / "guided")
    subject = torch_subject(str(tmp_path / "guided"))
    assert (subject.steps, subject.nfe) == (50, 100)
