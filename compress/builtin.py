"""Where the built-in data lies: the default teacher, its images, and the feature network that scores."""

from __future__ import annotations

from pathlib import Path

CALIB_DATA = Path(__file__).resolve().parent.parent / "calib_data"
TEACHER = CALIB_DATA / "teacher"
FEATURES = CALIB_DATA / "features.onnx"
PROMPTS = CALIB_DATA / "prompts.txt"
REFERENCE = CALIB_DATA / "reference.npz"
RECIPES = Path(__file__).resolve().parent / "recipes"
