"""compress/search/space.py: everything that can be drawn is a recipe that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.recipe import Recipe
from diffpress.compress.search.space import Space, draw, space_of, stages_for, starting_points, trains
from diffpress.runtime.errors import InvalidInputError

KINDS = ("none", "guidance", "trajectory", "consistency")
SPACE = Space(("none", "taylor", "diff_pruning", "depth"), (1, 2), KINDS, (4, 8), False, 90)


def drawn(count: int, space: Space = SPACE) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [draw(study.ask(), space) for _ in range(count)]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def loaded(stages: list[dict[str, Any]], folder: Path) -> Recipe:
    (folder / "r.yaml").write_text(yaml.safe_dump({"stages": stages}))
    return Recipe.load(folder / "r.yaml")


def test_every_drawn_choice_gives_a_recipe_that_loads_at_every_budget(tmp_path: Path) -> None:
    for params in drawn(40):
        for fraction in (1 / 9, 1.0):
            loaded(stages_for(params, SPACE, fraction), tmp_path)


def test_only_the_steps_of_training_depend_on_the_budget(tmp_path: Path) -> None:
    for params in drawn(60):
        small, full = (stages_for(params, SPACE, fraction) for fraction in (1 / 9, 1.0))
        assert (small == full) is not trains(params)
        for before, after in zip(small, full, strict=True):
            (name,) = before
            fixed = ("steps", "warmup", "ema") if name == "distill" else ()
            assert {k: v for k, v in before[name].items() if k not in fixed} == {
                k: v for k, v in after[name].items() if k not in fixed
            }


def test_trials_that_differ_in_their_quantization_have_equal_stages_before_it() -> None:
    params = {"prune": "taylor", "macs": 0.5, "distill": "none", "recover": 1.0, "recover_timesteps": "all"}
    params |= {"solver": "ddim", "steps": 4, "searched": False, "cache": 0.0}
    int8, w4a8 = (stages_for(params | {"format": f, "min_sqnr_db": 0.0}, SPACE) for f in ("int8", "w4a8"))
    assert int8[:-1] == w4a8[:-1] and int8[-1] != w4a8[-1]


def test_recovery_on_the_timesteps_of_the_plan_comes_after_it() -> None:
    params = {"prune": "taylor", "macs": 0.5, "distill": "none", "recover": 1.0, "solver": "ddim", "steps": 4}
    params |= {"searched": False, "cache": 0.0, "format": "fp16"}
    names = {
        timesteps: [next(iter(stage)) for stage in stages_for(params | {"recover_timesteps": timesteps}, SPACE)]
        for timesteps in ("all", "plan")
    }
    assert names == {"all": ["prune", "distill", "schedule"], "plan": ["schedule", "prune", "distill"]}


def test_starting_points_can_be_drawn_from_the_space(unet: Checkpoint) -> None:
    for space in (space_of(unet, 90, False), space_of(unet, 90, True), SPACE):
        for point in starting_points(space):
            assert draw(optuna.trial.FixedTrial(point), space) == point


def test_kinds_whose_samples_cannot_be_compared_are_left_out_without_features(unet: Checkpoint) -> None:
    assert "consistency" in space_of(unet, 90, False).kinds
    assert "consistency" not in space_of(unet, 90, True).kinds


def test_a_quantized_checkpoint_is_refused(quantized: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match="quantized already"):
        space_of(quantized, 90, False)
