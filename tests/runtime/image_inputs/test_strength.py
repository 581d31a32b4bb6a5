"""runtime/image_inputs/strength.py: the steps that remain, by the rules of diffusers' get_timesteps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from diffpress.runtime.conditioning import Conditioning, TextInput
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.strength import with_strength
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule, flow_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import TimestepSpacing

VP, FLOW = betas_schedule("linear"), flow_schedule()
TEXT = Conditioning("text", inputs={"encoder_hidden_states": TextInput((3, 2), ())}, guidance_input=True)


def spec_of(schedule: NoiseSchedule, steps: int, spacing: str = "trailing") -> DenoiserSpec:
    prediction = "flow" if schedule is FLOW else "epsilon"
    return DenoiserSpec(prediction, schedule, (3, 8, 8), make_plan("ddim", steps, schedule, spacing=spacing))


@pytest.mark.parametrize("steps", [1, 4, 5, 10, 28, 50])
@pytest.mark.parametrize("strength", [0.02, 0.1, 0.3, 0.5, 0.58, 0.6, 0.7, 0.99, 1.0])
def test_the_first_step_is_that_of_diffusers(steps: int, strength: float) -> None:
    pipelines = pytest.importorskip("diffusers")

    class Scheduler:
        order, timesteps = 1, range(steps)

    def first_of(kind: Any) -> int:
        pipe = kind.__new__(kind)
        pipe.__dict__["scheduler"] = Scheduler()
        return steps - len(pipe.get_timesteps(steps, strength, "cpu")[0])

    expected = first_of(pipelines.StableDiffusionImg2ImgPipeline)
    if expected == steps:
        with pytest.raises(InvalidInputError, match="none of"):
            with_strength(spec_of(VP, steps), strength)
    else:
        assert with_strength(spec_of(VP, steps), strength) == (spec_of(VP, steps), expected)
    assert with_strength(spec_of(FLOW, steps), strength)[1] == first_of(pipelines.FluxImg2ImgPipeline)


@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (4, 0.5), (3, 0.6), (5, 0.1)])
def test_a_latent_consistency_model_takes_all_its_steps_from_lower_timesteps(steps: int, strength: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    spec = replace(spec_of(VP, steps, "lcm"), conditioning=TEXT, spacing=TimestepSpacing("lcm"))
    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(steps, strength=strength)
    found, first = with_strength(spec, strength)
    assert first == 0 and list(found.plan.timesteps) == scheduler.timesteps.tolist()


def test_a_plan_of_its_own_is_shortened_for_a_latent_consistency_model_too() -> None:
    spec = replace(spec_of(VP, 4), conditioning=TEXT, spacing=TimestepSpacing("lcm"))
    assert with_strength(spec, 0.5) == (spec, 2)


def test_too_small_a_strength_names_what_suffices() -> None:
    with pytest.raises(InvalidInputError, match=r"^--strength 0.2: none of the plan's 4 steps remains.* 0\.25"):
        with_strength(spec_of(VP, 4), 0.2, "--strength")
    assert with_strength(spec_of(VP, 3), 0.334)[1] == 2
    lcm = replace(spec_of(VP, 4, "lcm"), conditioning=TEXT, spacing=TimestepSpacing("lcm"))
    with pytest.raises(InvalidInputError, match=r"strength 0\.05 leaves 2"):
        with_strength(lcm, 0.05)
