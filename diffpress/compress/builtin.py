"""Paths of the built-in data: default teacher, reference images, prompts, feature network and recipes."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGED = _PACKAGE / "calib_data"  # exists in a wheel; in a checkout the folder lies beside the package
CALIB_DATA = _PACKAGED if _PACKAGED.is_dir() else _PACKAGE.parent / "calib_data"
TEACHER = CALIB_DATA / "teacher"
FEATURES = CALIB_DATA / "features.onnx"
PROMPTS = CALIB_DATA / "prompts.txt"
REFERENCE = CALIB_DATA / "reference.npz"
# what selects must not be what reports
SELECTION_FEATURES = CALIB_DATA / "selection_features.onnx"
SELECTION_REFERENCE = CALIB_DATA / "calibration.npz"
RECIPES = Path(__file__).resolve().parent / "recipes"


def built_in_path(path: str | Path, folder: Path = Path()) -> Path:
    """Return a path relative to `folder`; `calib_data/...` that is not there is in the built-in data."""
    parts, own = Path(path).parts, folder / path
    return CALIB_DATA.joinpath(*parts[1:]) if parts[:1] == (CALIB_DATA.name,) and not own.exists() else own


def built_in_recipes() -> dict[str, Path]:
    """Return the file of each built-in recipe, by name in alphabetical order."""
    return {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}


def recipe_file(name: str | Path) -> Path:
    """Return the path of a recipe; a name without such a file may be that of a built-in recipe."""
    path = Path(name)
    return path if path.exists() else built_in_recipes().get(str(name), path)
