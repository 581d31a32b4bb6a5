"""README.md: short, its Python runs as printed, its commands parse, its links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)


def test_it_has_at_most_120_lines() -> None:
    assert len(README.splitlines()) <= 120


def test_its_python_runs_as_printed(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    (code,) = [text for language, text in BLOCKS if language == "python"]
    (tmp_path / "calib_data").symlink_to(ROOT / "calib_data")
    check = "\nassert len(images) == 4 and images[0].size == (28, 28)\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code + check], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_its_commands_parse() -> None:
    lines = [line for _, text in BLOCKS for line in text.splitlines() if line.startswith("diffpress ")]
    assert len(lines) >= 3
    for line in lines:
        _, verb, *words = shlex.split(line)
        parser = argparse.ArgumentParser()
        importlib.import_module(f"diffpress.cli.{verb}").add_arguments(parser)
        parser.parse_args(words)


def test_its_links_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 8 and [t for t in targets if not (ROOT / t).exists()] == []
