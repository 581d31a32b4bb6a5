"""Another solver on a model whose scheduler config is that of one class: `Class.from_config(pipe.scheduler.config)`.

diffusers couples solver and spacing, so whole trajectories are compared, for every pair of scheduler and solver.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import pytest

from diffpress.compress.sources.scheduler_classes import EQUIVALENTS, SCHEDULERS
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.requested_plan import requested_plan
from diffpress.runtime.spec import DenoiserSpec
from tests.compress.sources.scheduler_oracle import LATENT, agrees, build_scheduler, compare_db, read_spec, saved_config

Settings = dict[str, Any]
FOLDERS = tuple(
    name for name, entry in SCHEDULERS.items() if entry.family != "flow" and name != "DPMSolverSDEScheduler"
)
SETTINGS: tuple[Settings, ...] = (
    {},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace", "prediction_type": "v_prediction"},
    {"use_karras_sigmas": True},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"final_sigmas_type": "sigma_min"},
    {"set_alpha_to_one": False},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
)


def config_of(name: str, settings: Settings, explicit: bool) -> Settings | None:
    """Return a config with every entry, or with these alone; None if the class has no such entries."""
    entries = inspect.signature(getattr(diffusers, name).__init__).parameters
    if not set(settings) <= set(entries):
        return None
    kept = {"clip_sample": False, "skip_prk_steps": True}
    settings = LATENT | {key: value for key, value in kept.items() if key in entries} | settings
    return saved_config(build_scheduler(name, settings)) if explicit else {"_class_name": name} | settings


def requested(spec: DenoiserSpec, solver: str, steps: int | None) -> DenoiserSpec:
    return spec.with_plan(requested_plan(spec, steps, solver, None, None))


def their_scheduler(config: Settings, solver: str, steps: int) -> Any | None:
    """Return diffusers' scheduler for a solver; None if diffusers cannot build or run it."""
    name, changed = EQUIVALENTS[solver]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            scheduler = getattr(diffusers, name).from_config(config, **changed)
        scheduler.set_timesteps(steps)
    except Exception:  # it raises many types
        return None
    return scheduler


def wrong_solvers(config: Settings, steps: int) -> tuple[list[str], int]:
    """Return the solvers whose sample is not that of diffusers, and the number of those that are."""
    spec, wrong, right = read_spec(config, 10), [], 0
    for solver, (name, _) in EQUIVALENTS.items():
        if name == "DPMSolverSDEScheduler" or (
            name == "PNDMScheduler" and ("_v" in solver) != (spec.prediction == "v")
        ):
            continue
        scheduler = their_scheduler(config, solver, steps)
        if scheduler is None:
            continue
        try:
            ours = requested(spec, solver, steps)
            theirs_db = compare_db(scheduler, ours, steps)
        except InvalidInputError:
            continue
        right += theirs_db >= 90.0
        if theirs_db < 90.0 and not agrees(their_scheduler(config, solver, steps), ours, steps):
            wrong.append(f"{solver} {theirs_db:.0f} dB")
    return wrong, right


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("settings", SETTINGS[:2])
def test_requested_solvers_take_the_timesteps_of_from_config(name: str, settings: Settings) -> None:
    config = config_of(name, settings, explicit=True)
    assert config is not None
    wrong, right = wrong_solvers(config, 7)
    assert not wrong and right >= 15


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [True, False], ids=["saved", "hand-written"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", FOLDERS)
def test_every_pair_of_scheduler_and_solver_samples_as_in_diffusers(
    name: str, settings: Settings, explicit: bool
) -> None:
    config = config_of(name, settings, explicit)
    if config is None:
        pytest.skip("the class has no such entries")
    try:
        wrong = [found for steps in (4, 7) for found in wrong_solvers(config, steps)[0]]
    except InvalidInputError as error:
        pytest.skip(f"refused: {error}")
    assert not wrong


SDXL = LATENT | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1}


@pytest.mark.parametrize(
    ("solver", "steps", "first", "last"),
    [
        ("lcm", 4, 999, 259),
        ("dpmpp_2m", 8, 889, 112),
        ("unipc_2", 8, 889, 112),
        ("deis_2", 8, 889, 112),
        ("ddim", 8, 876, 1),
        ("plms", 8, 876, 1),
    ],
)
def test_the_spacing_of_the_model_is_carried_over_to_the_solver(
    solver: str, steps: int, first: float, last: float
) -> None:
    plan = requested(read_spec(SDXL | {"clip_sample": False}, 30), solver, steps).plan
    assert (plan.timesteps[0], plan.timesteps[-1]) == (first, last)


def test_another_solver_alone_takes_new_timesteps_and_its_own_ends() -> None:
    spec = read_spec(SDXL, 30)
    plan = requested(spec, "deis_2", None).plan
    assert plan.steps == 30 and plan.timesteps[0] == 961 and plan.end == 0.0
    chosen = spec.with_plan(spec.plan.over((900.0, 500.0, 100.0)))
    assert requested(chosen, "dpmpp_2m", None).plan.timesteps == (900.0, 500.0, 100.0)  # by hand or by a search


def test_a_class_default_of_the_other_scheduler_applies_where_the_config_has_no_entry() -> None:
    """Stable Diffusion 1.5 has no timestep_spacing: leading for PNDM, linspace for DPM-Solver."""
    config = LATENT | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    spec = read_spec(config, 50)
    assert spec.plan.timesteps[0] == 981 and requested(spec, "dpmpp_2m", 20).plan.timesteps[0] == 999
    assert requested(spec, "ddim", 20).plan.solver == "ddim_clip"  # the default of DDIMScheduler, as from_config has it


@pytest.mark.parametrize(
    ("settings", "solver", "reason"),
    [
        ({"timestep_spacing": "trailing"}, "plms", "timestep_spacing trailing"),
        ({"timestep_spacing": "trailing"}, "ddpm_large", "timestep_spacing trailing"),
        ({"rescale_betas_zero_snr": True}, "heun", "noise schedule of HeunDiscreteScheduler"),
    ],
)
def test_solvers_that_cannot_follow_the_config_are_refused_with_the_reason(
    settings: Settings, solver: str, reason: str
) -> None:
    spec = read_spec(LATENT | {"_class_name": "EulerDiscreteScheduler"} | settings, 10)
    with pytest.raises(InvalidInputError, match=f"solver '{solver}' cannot sample this model.*{reason}"):
        requested(spec, solver, 5)


def test_the_spec_of_a_common_config_has_no_new_entries() -> None:
    """So that the hashes of checkpoints stay the same."""
    config = SDXL | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    data = read_spec(config, 30).to_json()
    assert not {"ratios", "stride"} & set(data["plan"]) and set(data["spacing"]) == {
        "kind",
        "offset",
        "integer",
        "shift",
        "dynamic",
    }
