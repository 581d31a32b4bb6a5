"""The spec that a request is sampled with: the bundle's own with the size and plan that the request asks for.

Everything that could fail is checked here, before a request is queued: the solver runs once over an empty batch.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.image_size import sized
from diffpress.runtime.io.json_fields import convert_errors, floats
from diffpress.runtime.network_inputs import dummy_conditioning, network_conditioning
from diffpress.runtime.requested_plan import requested_spec, warn_of_lost_cache
from diffpress.runtime.sampler import evaluated_levels
from diffpress.runtime.sampling_plan import SamplingPlan, plan_from_json
from diffpress.runtime.solvers import get_solver
from diffpress.runtime.spec import DenoiserSpec
from diffpress.serve.requests.fields import is_number

PLAN_LOGGER = "diffpress.runtime.requested_plan"


def _is_number_list(value: object) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


# entry of a request's `plan` -> whether a JSON value has its type; the names are those of SamplingPlan
PLAN_ENTRIES: Mapping[str, Callable[[Any], bool]] = {
    "timesteps": _is_number_list,
    "ratios": _is_number_list,
    "stride": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "eta": is_number,
    "clip": lambda value: isinstance(value, bool),
    "end": lambda value: value is None or is_number(value),
    "start": lambda value: isinstance(value, str),
    "threshold": lambda value: value is None or isinstance(value, dict),
    "guidance_interval": lambda value: value is None or (isinstance(value, list) and len(value) == 2),
    "guidance_rescale": is_number,
}


class Planned(NamedTuple):
    """A checked spec, and what the client should know of its plan."""

    spec: DenoiserSpec
    warnings: tuple[str, ...]


def planned(
    bundle: Bundle,
    steps: int | None,
    solver: str | None,
    spacing: str | None,
    guidance: float | None,
    size: tuple[int, int] | None,
    plan: str,
    step_cache: bool = True,
) -> Planned:
    """Return the bundle's spec with the requested size and plan.

    Args:
        bundle: The bundle.
        steps: As in `Pipeline`, like the next three.
        solver: See `steps`.
        spacing: See `steps`.
        guidance: See `steps`.
        size: Height and width in pixels.
        plan: Other entries of the plan as a JSON object (`PLAN_ENTRIES`), '' for none.
        step_cache: As in `Pipeline`.

    Raises:
        InvalidInputError: The model cannot be sampled like this.
    """
    with _collected_warnings() as warnings:
        spec = requested_spec(sized(bundle, size), steps, solver, spacing, guidance, step_cache=step_cache)
        if plan:
            spec = _with_entries(spec, json.loads(plan), steps is not None or spacing is not None)
    if bundle.spec.plan.output_corrections and not spec.plan.output_corrections:
        warnings.append("the bundle's output corrections do not fit this plan and are left out")
    _check(spec)
    return Planned(spec, tuple(warnings))


def _with_entries(spec: DenoiserSpec, entries: dict[str, Any], is_spaced: bool) -> DenoiserSpec:
    """Return the spec with these entries in its plan; other timesteps drop its ratios and stride."""
    for name, value in entries.items():
        if name not in PLAN_ENTRIES:
            raise InvalidInputError(f"plan: unknown entry '{name[:60]}'; choose from {', '.join(PLAN_ENTRIES)}")
        if not PLAN_ENTRIES[name](value):
            raise InvalidInputError(f"plan.{name}: is of the wrong type")
    if "timesteps" in entries and is_spaced:
        raise InvalidInputError("plan.timesteps: give timesteps, or steps and spacing, not both")
    base = spec.plan.without_corrections
    with convert_errors("plan"):
        if "timesteps" in entries:
            base = base.over(floats(entries["timesteps"]))
            warn_of_lost_cache(spec, base)
            if spec.takes_integers and any(t % 1.0 for t in base.timesteps):
                raise InvalidInputError("plan.timesteps: this network takes integer timesteps")
    plan: SamplingPlan = plan_from_json({**base.to_json(), **entries})
    return spec if plan == spec.plan.without_corrections else spec.with_plan(plan)


def _check(spec: DenoiserSpec) -> None:
    """Run the plan over an empty batch; raise InvalidInputError if it cannot be sampled."""
    get_solver(spec.plan.solver)
    network_conditioning(spec, dummy_conditioning(spec, 1), is_guided(spec, spec.plan.guidance))
    try:
        with np.errstate(all="ignore"):
            levels = evaluated_levels(spec)
    except (ArithmeticError, ValueError) as error:
        raise InvalidInputError(f"plan: {spec.plan.solver} cannot sample it ({error})") from error
    if not all(np.isfinite([level.alpha, level.sigma]).all() for level in levels):
        raise InvalidInputError(f"plan: {spec.plan.solver} leaves the noise schedule; use other timesteps or ratios")
    foreign = [level.t for level in levels if spec.fixed_timesteps and level.t not in spec.fixed_timesteps]
    if foreign:
        raise InvalidInputError(
            f"plan: {spec.plan.solver} evaluates timestep {foreign[0]:g}, and this network was exported for "
            f"{len(spec.fixed_timesteps)} others; use the bundle's own plan"
        )


class _Collector(logging.Handler):
    """Collects the messages of one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.messages.append(record.getMessage())


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Collect what the runtime warns of while it makes a plan."""
    logger, handler = logging.getLogger(PLAN_LOGGER), _Collector()
    logger.addHandler(handler)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
