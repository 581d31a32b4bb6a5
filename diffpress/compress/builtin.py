"""Where the built-in data lies: the default teacher, its images, and the feature network that scores."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGED = _PACKAGE / "calib_data"  # in a wheel; a checkout keeps it beside the package
CALIB_DATA = _PACKAGED if _PACKAGED.is_dir() else _PACKAGE.parent / "calib_data"
TEACHER = CALIB_DATA / "teacher"
FEATURES = CALIB_DATA / "features.onnx"
PROMPTS = CALIB_DATA / "prompts.txt"
REFERENCE = CALIB_DATA / "reference.npz"
RECIPES = Path(__file__).resolve().parent / "recipes"
