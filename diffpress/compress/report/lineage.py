"""Where a bundle comes from: the stages with the settings that differ from the defaults, and their losses."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from diffpress.compress.stages import STAGES
from diffpress.compress.training.loss_log import LOSSES, read_losses
from diffpress.compress.workspace import Workspace
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json

SHOWN_POINTS = 200  # of a training curve
RECORD = "diffpress.json"
SELECTORS = ("kind", "method")  # settings that name what is done, shown even if they are the default


def lineage_of(history: list[dict[str, Any]], bundle_hash: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the hashes from the checkpoint to the bundle, with each stage's effect and changed settings."""
    stages = []
    given = inputs.get("checkpoint", inputs.get("teacher"))
    is_earlier = any(record["before"] == given for record in history)  # what the checkpoint went through before the run
    for number, record in enumerate(history, 1):
        changed = record["changed"]
        is_earlier = is_earlier and record["before"] != given
        # the second name is that of diffpress 0.1
        sqnr_db = changed.get("teacher_sqnr_db", changed.get("sqnr_db_to_teacher"))
        stages.append(
            {
                "number": number,
                "stage": record["stage"],
                "earlier": is_earlier,
                "settings": changed_settings(record["stage"], record["config"]),
                "before": record["before"],
                "after": record["after"],
                "parameters": changed["parameters"],
                "macs": changed["macs"],
                "plan": changed["plan"],
                "teacher_sqnr_db": sqnr_db,
            }
        )
    start = history[0]["before"] if history else given
    return {"checkpoint": start, "teacher": inputs.get("teacher"), "stages": stages, "bundle": bundle_hash}


def changed_settings(stage: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's settings that differ from the defaults, by dotted names; all if they are unknown here."""
    try:
        made = TypeAdapter(STAGES[stage].config).validate_python(config)
    except (KeyError, ValidationError, InvalidInputError):
        return _dotted(config)
    changed = made.model_dump(mode="json", exclude_defaults=True)
    return _dotted({name: config[name] for name in SELECTORS if name in config} | changed)


def _dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found |= _dotted(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def training_curves(run: Workspace, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return {stage, what, steps, points: [[step, mean loss, least, largest]]} of every training with a log."""
    found = []
    folders = _stage_folders(run)
    for number, record in enumerate(history, 1):
        folder = folders.get(record["after"])
        if folder is None:
            continue
        logs = run.logs(folder)
        for file in sorted(logs.rglob(LOSSES)):
            rows = read_losses(file)
            if rows:
                phase = file.parent.relative_to(logs).as_posix().replace(".", "")
                what = " ".join(filter(None, (record["stage"], record["config"].get("kind"), phase)))
                found.append({"stage": number, "what": what, "steps": rows[-1][0], "points": _binned(rows)})
    return found


def _stage_folders(run: Workspace) -> dict[str, Path]:
    """Return the folders of the finished stages by the hash of their result: a run may have left others there."""
    records = sorted(run.stages.glob(f"*/{RECORD}"))
    return {str(read_json(record).get("hash")): record.parent for record in records}


def _binned(rows: list[tuple[int, float]]) -> list[list[float]]:
    """Return [last step, mean, least, largest] of groups of neighbouring steps."""
    size = -(-len(rows) // SHOWN_POINTS)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [[group[-1][0], fmean(v := [loss for _, loss in group]), min(v), max(v)] for group in groups]
