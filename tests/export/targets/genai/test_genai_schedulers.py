"""Scheduler configs for OpenVINO GenAI: diffusers' own classes give the plan's timesteps with them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest

from diffpress.compress.sources.diffusers_folder import spec_of_folder
from diffpress.export.targets.genai.schedulers import genai_plan
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.requested_plan import requested_plan
from diffpress.runtime.sampling_plan import OutputCorrection, SamplingPlan
from diffpress.runtime.spec import DenoiserSpec
from tests.pipelines import tiny_pipeline

ENDS = ("beta_start", "beta_end")
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def spec_with(plan: SamplingPlan, scheduler: dict[str, Any]) -> DenoiserSpec:
    schedule = betas_schedule(scheduler["beta_schedule"], 1000, *(scheduler[key] for key in ENDS if key in scheduler))
    return DenoiserSpec(prediction="epsilon", schedule=schedule, sample_shape=(4, 8, 8), plan=plan)


def plan_of(name: str, steps: int, **settings: Any) -> SamplingPlan:
    """Return a plan over the timesteps that diffusers' class computes."""
    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **SCALED, **settings)
    scheduler.set_timesteps(steps)
    timesteps = tuple(map(float, scheduler.timesteps))
    end = None if settings.get("set_alpha_to_one", True) else 0.0
    stride = 1000 // steps if settings["timestep_spacing"] == "linspace" else 0  # a step of DDIM ends T // N lower
    return SamplingPlan("ddim", timesteps, guidance=5.0, clip=False, end=end, stride=stride)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_plans_of_ddim_are_followed_in_every_spacing(spacing: str, to_one: bool, offset: int) -> None:
    settings = {"timestep_spacing": spacing, "set_alpha_to_one": to_one, "steps_offset": offset}
    plan = plan_of("DDIMScheduler", 10, **settings)
    found = genai_plan(spec_with(plan, SCALED), SCALED, nearest=False)
    rebuilt = getattr(diffusers, found.config["_class_name"]).from_config(found.config)
    rebuilt.set_timesteps(10)
    assert tuple(rebuilt.timesteps) == plan.timesteps and found.plan.end == plan.end and not found.changes


def test_other_noise_schedules_are_passed_as_betas() -> None:
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    scheduler: Any = diffusers.DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing", **cosine)
    scheduler.set_timesteps(5)
    plan = SamplingPlan("ddim", tuple(map(float, scheduler.timesteps)), clip=False)
    config = genai_plan(spec_with(plan, cosine), cosine, nearest=False).config
    rebuilt: Any = diffusers.DDIMScheduler.from_config(config)
    assert config["beta_schedule"] == "linear"  # GenAI knows no cosine
    np.testing.assert_allclose(rebuilt.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"timesteps": (999.0, 731.0, 402.0)}, r"solver and timesteps \(3 steps of ddim\)"),
        ({"solver": "dpmpp_2m"}, r"solver and timesteps \(10 steps of dpmpp_2m\)"),
        ({"output_corrections": (OutputCorrection(0.1, (0.0,) * 4),) * 10}, "output_corrections"),
        ({"guidance_rescale": 0.7}, r"guidance_rescale \(0.7\)"),
        ({"guidance_interval": (0.1, 2.0)}, "guidance_interval"),
        ({"clip": True}, "clip"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_followed_is_refused_by_name_or_named_as_a_change(change: dict[str, Any], named: str) -> None:
    plan = replace(plan_of("DDIMScheduler", 10, timestep_spacing="trailing"), **change)
    spec = spec_with(plan, SCALED)
    with pytest.raises(InvalidInputError, match=f"{named}.*--nearest-plan"):
        genai_plan(spec, SCALED, nearest=False)
    found = genai_plan(spec, SCALED, nearest=True)
    assert found.changes and found.plan.steps == plan.steps and found.plan.guidance == plan.guidance


def test_the_nearest_plan_has_the_nearest_timesteps() -> None:
    trailing = plan_of("DDIMScheduler", 5, timestep_spacing="trailing")
    moved = replace(trailing, timesteps=tuple(t - 3.0 for t in trailing.timesteps))
    found = genai_plan(spec_with(moved, SCALED), SCALED, nearest=True)
    assert found.plan.timesteps == trailing.timesteps


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "lcm"])
def test_plans_of_pipelines_are_followed(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_pipeline(kind, tmp_path_factory.mktemp(kind) / "pipeline")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    spec = spec_of_folder(folder)
    for steps in (1, 4, 28):
        asked = spec.with_plan(requested_plan(spec, steps, None, None, None))
        found = genai_plan(asked, scheduler, nearest=False)
        assert found.plan.timesteps == asked.plan.timesteps
