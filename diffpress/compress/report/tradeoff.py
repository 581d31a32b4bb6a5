"""Quality against latency: the points of the teacher, the uncompressed model in the same engine, and the bundle.

Latency is that of `bench.json`, quality the Fréchet distance of `evaluation.json`. A subject has a quality only if what
was scored is what was timed: PyTorch eager may have run under another sampling plan than the scored teacher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from diffpress.compress.report.figures import bundle_rows
from diffpress.runtime.benchmarking.bench import TORCH

TORCH_SOLVER = "ddim"  # of models of pixels in PyTorch eager (compress/evaluation/torch_baseline.py)

SUBJECTS = {"torch": "PyTorch eager", "baseline": "teacher in {}", "bundle": "bundle in {}"}


class Point(NamedTuple):
    """A subject: its latency, and the mean and standard deviation of its Fréchet distance, if that was scored.

    `role` is one of SUBJECTS.
    """

    label: str
    role: str
    ms: float
    quality: float | None
    sd: float | None


class Tradeoff(NamedTuple):
    """Points of one batch size; `floor` is the distance of real images to each other."""

    batch: int
    scored: str
    floor: float
    points: tuple[Point, ...]


def tradeoff_of(facts: dict[str, Any]) -> Tradeoff | None:
    """Return the points at the smallest batch size; None if latency or quality was not measured."""
    scores, ours = facts["evaluation"], bundle_rows(facts)
    if not ours or not scores or not scores["bundle"]["frechet"]:
        return None
    batch = min(row["batch"] for row in ours)
    points = []
    for row in facts["bench"]["rows"]:
        if row["batch"] != batch:
            continue
        role = "torch" if row["engine"] == TORCH else "bundle" if row in ours else "baseline"
        spread = scores["bundle"]["frechet"] if role == "bundle" else _teacher_quality(facts, row)
        name = SUBJECTS[role].format(row["engine"])
        label = f"{name}, {row['steps']} step{'s' * (row['steps'] != 1)}"
        points.append(Point(label, role, row["image_ms"], spread.get("mean"), spread.get("sd")))
    score = scores["bundle"]
    scored = f"Fréchet distance ({score['seeds']} x {score['samples']} samples, {score['features']['name']})"
    return Tradeoff(batch, scored, scores["baseline"]["frechet"]["floor"], tuple(points))


def _teacher_quality(facts: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Return the teacher's score if the row was timed under the plan that was scored, else nothing."""
    baseline = facts["baseline"]
    plan = baseline["plan"]
    is_scored = (row["steps"], row["nfe"]) == (len(plan["timesteps"]), plan["evaluations"])
    if row["engine"] == TORCH and baseline["is_pixel_space"]:
        is_scored = is_scored and plan["solver"] == TORCH_SOLVER
    return facts["evaluation"]["baseline"]["frechet"] if is_scored else {}
