"""Settings with which a solver samples a model, where they are not those of the general rules (carried_settings.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffpress.runtime.io.json_fields import boolean, check_fields, convert_errors, without_defaults
from diffpress.runtime.sampling_plan import SamplingPlan, Threshold, threshold_from_json
from diffpress.runtime.timesteps import TimestepSpacing, spacing_from_json


@dataclass(frozen=True)
class SolverSettings:
    """Settings of a plan of this solver; `start`, `end`, `clip` and `threshold` are as in SamplingPlan.

    Attributes:
        solver: Name of the solver, as a user requests it.
        runs: Solver of the plan: `ddim` runs as `ddim_clip` if the scheduler clips x_0.
        spacing: Timestep spacing.
        refused: Why the solver cannot sample the model as its scheduler config says; empty if it can.
    """

    solver: str
    runs: str
    spacing: TimestepSpacing = field(default_factory=TimestepSpacing)
    start: str = SamplingPlan.start
    end: float | None = None
    clip: bool | None = None
    threshold: Threshold | None = None
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON-serializable data."""
        return without_defaults(self, ("refused",)) | {"spacing": self.spacing.to_json()}


def solver_settings_from_json(data: Any, where: str) -> SolverSettings:
    """Read solver settings from their JSON form.

    Raises:
        InvalidInputError: An entry is missing, unknown or of the wrong type; the message starts with `where`.
    """
    raw = check_fields(SolverSettings, data, where)
    with convert_errors(where):
        return SolverSettings(
            solver=str(raw["solver"]),
            runs=str(raw["runs"]),
            spacing=spacing_from_json(raw.get("spacing", {}), f"{where}.spacing"),
            start=str(raw.get("start", SamplingPlan.start)),
            end=None if raw.get("end") is None else float(raw["end"]),
            clip=None if raw.get("clip") is None else boolean(raw["clip"]),
            threshold=None if raw.get("threshold") is None else threshold_from_json(raw["threshold"], where),
            refused=str(raw.get("refused", "")),
        )
