"""Conversion of format 1 (diffpress 0.1) to the names of format 2, so that older bundles and checkpoints load.

Only names changed between the two formats; numbers and graphs are the same.
"""

from __future__ import annotations

from typing import Any

PLAN_NAMES = {"corrections": "output_corrections"}
THRESHOLD_NAMES = {"most": "max"}
SPACING_NAMES = {"grid": "kind", "whole": "integer"}
SPEC_NAMES = {"distilled_also": "distilled_timesteps"}


def upgraded_spec(spec: Any) -> Any:
    """Rename the entries of a format-1 `DenoiserSpec` in JSON; values that are no objects are returned unchanged."""
    spec = _renamed(spec, SPEC_NAMES)
    if isinstance(spec, dict):
        spec = _replaced(spec, "spacing", SPACING_NAMES)
        spec = _replaced(spec, "plan", PLAN_NAMES)
        if isinstance(spec.get("plan"), dict):
            spec["plan"] = _replaced(spec["plan"], "threshold", THRESHOLD_NAMES)
    return spec


def upgraded_tensor_name(name: str) -> str:
    """Return the format-2 name of a tensor in a format-1 quantization.safetensors."""
    return f"svdquant.{name.removeprefix('branch.')}" if name.startswith("branch.") else name


def _replaced(data: dict[str, Any], key: str, names: dict[str, str]) -> dict[str, Any]:
    return {**data, key: _renamed(data[key], names)} if key in data else data


def _renamed(data: Any, names: dict[str, str]) -> Any:
    return {names.get(key, key): value for key, value in data.items()} if isinstance(data, dict) else data
