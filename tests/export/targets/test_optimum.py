"""optimum-onnx loads a Stable Diffusion bundle and samples the same images as diffusers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_optimum_loads_bundles_and_samples_diffusers_images(tmp_path: Path) -> None:
    script, venv = ROOT / "benchmarks" / "optimum_reads_bundle.py", ROOT / "build" / "optimum" / "venv"
    command = [sys.executable, str(script), "--work", str(tmp_path), "--venv", str(venv)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(f"optimum-onnx cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" dB   (other prompts") == 6  # two kinds, three rows
