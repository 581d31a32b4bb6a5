"""The step cache of a sampling plan: what each step evaluates, as data that any engine replays.

    full        the whole network
    forecast    nothing: the network's output is predicted from those of earlier full steps (caching/forecast.py)
    cached      the outer layers, with features of the last full step in the place of the others (caching/features.py)

The first step is full. A plan whose steps are all full gives the images of the plan without a cache, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.json_fields import check_fields, convert_errors

FULL, FORECAST, CACHED = "full", "forecast", "cached"
KINDS = {"forecast": (FULL, FORECAST), "features": (FULL, CACHED)}  # kind -> what its steps may evaluate
LETTERS = {FULL: "F", FORECAST: "-", CACHED: "c"}  # of records
MAX_ORDER = 2


@dataclass(frozen=True)
class StepCache:
    """What each step of a plan evaluates.

    Attributes:
        kind: One of KINDS.
        steps: One entry for each step of the plan.
        order: Order of the forecast: 0 repeats the last output, 1 and 2 extrapolate from the last two or three.
        cut: Which layers are the outer ones, a name that the network's family has; empty for forecasts.

    Examples:
        >>> import diffpress as dp
        >>> dp.StepCache("forecast", ("full", "full", "forecast", "full"), order=1).counts
        {'full': 3, 'forecast': 1}
    """

    kind: str
    steps: tuple[str, ...]
    order: int = 0
    cut: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInputError(f"plan: cache: kind '{self.kind}' is not one of {', '.join(KINDS)}")
        allowed = KINDS[self.kind]
        unknown = next((step for step in self.steps if step not in allowed), None)
        if unknown is not None:
            raise InvalidInputError(
                f"plan: cache: step '{unknown}' is not one of {', '.join(allowed)}, which kind '{self.kind}' has"
            )
        if self.steps[:1] != (FULL,):
            raise InvalidInputError("plan: cache: the first step must be 'full', since nothing was computed before it")
        if not 0 <= self.order <= MAX_ORDER:
            raise InvalidInputError(f"plan: cache: order {self.order} is not one of 0, 1, 2")
        if bool(self.cut) != (self.kind == "features"):
            raise InvalidInputError(f"plan: cache: cut '{self.cut}': kind 'features' needs a cut, and no other has one")

    @property
    def counts(self) -> dict[str, int]:
        """Return what steps evaluate -> number of those steps."""
        return dict(Counter(self.steps))

    @property
    def is_idle(self) -> bool:
        """Whether every step evaluates the whole network."""
        return set(self.steps) == {FULL}


def step_cache_from_json(data: Any, where: str) -> StepCache:
    """Read a step cache from its JSON form.

    Raises:
        InvalidInputError: An entry is missing, unknown or of the wrong type; the message starts with `where`.
    """
    raw = check_fields(StepCache, data, where)
    with convert_errors(where):
        if not isinstance(raw["steps"], list | tuple):
            raise InvalidInputError(f"{where}: steps must be a list, found {type(raw['steps']).__name__}")
        return StepCache(
            str(raw["kind"]), tuple(map(str, raw["steps"])), int(raw.get("order", 0)), str(raw.get("cut", ""))
        )
