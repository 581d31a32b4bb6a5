"""Format 1 (diffpress 0.1) in the names of format 2, so that bundles and checkpoints of then still load.

Only names changed between the two: the numbers, the graphs and what they compute are the same.
"""

from __future__ import annotations

from typing import Any

PLAN_NAMES = {"corrections": "output_corrections"}
THRESHOLD_NAMES = {"most": "max"}
SPACING_NAMES = {"grid": "kind", "whole": "integer"}
SPEC_NAMES = {"distilled_also": "distilled_timesteps"}


def upgraded_spec(spec: Any) -> Any:
    """The JSON of a format-1 `DenoiserSpec` as format 2 names it; anything that is no object comes back as it is."""
    spec = _renamed(spec, SPEC_NAMES)
    if isinstance(spec, dict):
        spec = _replaced(spec, "spacing", SPACING_NAMES)
        spec = _replaced(spec, "plan", PLAN_NAMES)
        if isinstance(spec.get("plan"), dict):
            spec["plan"] = _replaced(spec["plan"], "threshold", THRESHOLD_NAMES)
    return spec


def upgraded_tensor_name(name: str) -> str:
    """The name of a tensor in a format-1 quantization.safetensors as format 2 has it."""
    return f"svdquant.{name.removeprefix('branch.')}" if name.startswith("branch.") else name


def _replaced(data: dict[str, Any], key: str, names: dict[str, str]) -> dict[str, Any]:
    return {**data, key: _renamed(data[key], names)} if key in data else data


def _renamed(data: Any, names: dict[str, str]) -> Any:
    return {names.get(key, key): value for key, value in data.items()} if isinstance(data, dict) else data
