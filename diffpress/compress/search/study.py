"""The study: finished trials in a journal of Optuna, and the proposal of the next one.

Only finished trials are stored, so a killed trial leaves nothing behind. A proposal is made by a new sampler whose seed
follows from the trial's number, in a copy of the study in memory: it depends on the finished trials alone, and a
resumed study proposes what an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from diffpress.compress.search.space import Params, Space, draw, starting_points

NAME = "diffpress search"
OBJECTIVES = ("latency_ratio", "size_mib", "quality")  # all minimized
MAX_ATTEMPTS = 16  # proposals that repeat an earlier trial, before one is accepted
GREEDY_ATTEMPTS = 3  # of them by TPE, which often proposes its optimum again; the others are random
STARTUP_TRIALS = 10  # drawn at random before the sampler learns


@dataclass(frozen=True)
class Result:
    """What a finished trial found.

    Attributes:
        latency_ratio: Time of an image, as a ratio to the teacher's; from the latency table.
        size_mib: Size of the denoiser's graph with its weights.
        errors_db: Error of the samples against the teacher's at each budget that the trial was given.
        teacher_sqnr_db: SQNR of the output to the teacher's, along its noise levels.
        frechet_ratio: Frechet distance in the features that select, as a ratio to the teacher's; None if not measured.
        quality: That ratio, or its estimate from the error; the error itself without features.
        excesses: Bound -> how far it is exceeded, as a fraction; at most 0 if it is kept.
        seconds: Wall time.
        failure: Why the trial has no result; '' if it has.
    """

    latency_ratio: float = 0.0
    size_mib: float = 0.0
    errors_db: tuple[float, ...] = ()
    teacher_sqnr_db: float | None = None
    frechet_ratio: float | None = None
    quality: float = 0.0
    excesses: Mapping[str, float] | None = None
    seconds: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Trial:
    """A finished trial: its number from 0, what was chosen, and what it found."""

    number: int
    params: Params
    result: Result

    @property
    def name(self) -> str:
        """Name of its files and of its bundle."""
        return f"trial-{self.number:03d}"


class Study:
    """The finished trials of a search, stored in `file`."""

    def __init__(self, file: Path, space: Space, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._space, self._seed = space, seed
        storage = JournalStorage(JournalFileBackend(str(file)))
        self._study = optuna.create_study(
            storage=storage, study_name=NAME, directions=["minimize"] * len(OBJECTIVES), load_if_exists=True
        )

    @property
    def trials(self) -> list[Trial]:
        """All finished trials in order, failed ones included."""
        return [_trial_of(frozen) for frozen in self._stored]

    @property
    def _stored(self) -> list[FrozenTrial]:
        return sorted(self._study.get_trials(deepcopy=False), key=lambda trial: trial.number)

    def propose(self) -> Params:
        """Return the choices of the next trial."""
        stored = self._stored
        number, points = len(stored), starting_points(self._space)
        if number < len(points):
            return points[number]
        seen = [trial.user_attrs["params"] for trial in stored]
        for attempt in range(MAX_ATTEMPTS):
            found = self._sampled(stored, number, attempt)
            if found not in seen:
                break
        return found

    def _sampled(self, stored: Sequence[FrozenTrial], number: int, attempt: int) -> Params:
        seed = int(np.random.SeedSequence([self._seed, number, attempt]).generate_state(1)[0])
        copied = optuna.create_study(directions=["minimize"] * len(OBJECTIVES))
        if attempt < GREEDY_ATTEMPTS:
            copied.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, multivariate=False, seed=seed)
            copied.add_trials(stored)
        else:
            copied.sampler = optuna.samplers.RandomSampler(seed=seed)
        return draw(copied.ask(), self._space)

    def add(self, params: Params, result: Result) -> Trial:
        """Store a finished trial."""
        fixed = optuna.trial.FixedTrial(params)
        draw(fixed, self._space)
        failed = bool(result.failure)
        values = None if failed else [getattr(result, name) for name in OBJECTIVES]
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                values=values,
                params=fixed.params,
                distributions=fixed.distributions,
                user_attrs={"params": params, "result": asdict(result)},
                constraints=None if failed else dict(result.excesses or {}),
            )
        )
        return self.trials[-1]


def _trial_of(frozen: FrozenTrial) -> Trial:
    stored: dict[str, Any] = dict(frozen.user_attrs["result"])
    return Trial(
        frozen.number,
        dict(frozen.user_attrs["params"]),
        Result(**(stored | {"errors_db": tuple(stored["errors_db"])})),
    )
