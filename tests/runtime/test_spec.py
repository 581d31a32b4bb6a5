"""runtime/spec.py: a spec round-trips through JSON; missing, unknown or invalid entries are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule
from diffpress.runtime.sampling_plan import OutputCorrection, SamplingPlan, Threshold, make_plan, plan_from_json
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import TimestepSpacing

SCHEDULE = betas_schedule("squaredcos_cap_v2", 20)
SPEC = DenoiserSpec(
    prediction="v",
    schedule=SCHEDULE,
    sample_shape=(4, 8, 16),
    plan=make_plan("dpmpp_2m", 5, SCHEDULE, guidance=2.5, clip=False),
    conditioning=Conditioning("class", 10, null_label=10),
    latent_scale=0.18215,
    latent_shift=0.1,
    data_range=(0.0, 1.0),
)


TEXT = replace(
    SPEC,
    fixed_timesteps=(*SPEC.plan.timesteps, 1.0),
    plan=replace(
        SPEC.plan,
        end=0.0,
        output_corrections=tuple(OutputCorrection(k / 10, (0.1, k / 3, 0.0, -1.0)) for k in range(5)),
        start="noise",
        threshold=Threshold(0.99, 3.5),
        guidance_interval=(0.1 + 0.2, None),
        guidance_rescale=0.7,
    ),
    conditioning=Conditioning(
        "text",
        encoders=(
            TextEncoder("text_encoder", "tokenizer", 77, pad=49407),
            TextEncoder("t5", "t5_words", 8, lower=True),
        ),
        inputs={
            "encoder_hidden_states": TextInput((10, 12), (("text_encoder.a", "t5.b"), 2)),
            "time_ids": TextInput((4,), (("size", "corner"),)),
        },
        zero_negative=True,
        guidance_input=True,
    ),
    latent_factor=8,
    size_multiple=2,
    spacing=TimestepSpacing("linspace", offset=1, integer=False, shift=3.0, dynamic=(0.5, 1.15, 256.0, 4096.0)),
)


DISTILLED = replace(SPEC, distilled="score", distilled_timesteps=((10.0,),), baked_in_guidance=2.5)


@pytest.mark.parametrize("spec", [SPEC, TEXT, DISTILLED], ids=["classes", "text", "distilled"])
def test_a_spec_round_trips_through_json_exactly(spec: DenoiserSpec) -> None:
    assert DenoiserSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_spec_without_the_newer_entries_reads_with_their_defaults() -> None:
    data = json.loads(json.dumps(SPEC.to_json()))
    for entry in ("latent_factor", "size_multiple", "spacing", "fixed_timesteps"):
        del data[entry]
    for entry in ("end", "output_corrections", "start", "threshold", "guidance_interval", "guidance_rescale"):
        del data["plan"][entry]
    data["conditioning"] = {"kind": "class", "classes": 10, "null_label": 10}
    assert DenoiserSpec.from_json(data) == SPEC


def test_the_baked_in_guidance_is_an_entry_only_if_there_is_any() -> None:
    assert DISTILLED.to_json()["baked_in_guidance"] == 2.5
    assert "baked_in_guidance" not in SPEC.to_json() and SPEC.baked_in_guidance == 1.0


def test_image_size_and_tokens_follow_from_the_latent() -> None:
    assert TEXT.image_size == (64, 128) and SPEC.image_size == (8, 16)
    assert TEXT.tokens(TEXT.sample_shape) == 4 * 8 and TEXT.tokens((4, 16, 16)) == 64


def test_a_plan_round_trips_through_json() -> None:
    assert plan_from_json(json.loads(json.dumps(SPEC.to_json()["plan"]))) == SPEC.plan


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            data = data[parent]
        data[last] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.pop("prediction"), "'prediction' is missing"),
        (lambda data: data["plan"].pop("solver"), "'solver' is missing"),
        (change("colour", 1), "unknown entry 'colour'"),
        (change("plan.colour", 1), "plan: unknown entry 'colour'"),
        (change("prediction", "noise"), "prediction 'noise'"),
        (change("plan.start", "loud"), "start 'loud' is not one of marginal, noise, unit"),
        (change("plan.threshold", {"ratio": 0.0}), "ratio 0 must lie in"),
        (change("plan.threshold", {"ratio": 0.9, "max": 0.5}), "max 0.5 must be at least 1"),
        (change("plan.threshold", {"ratio": 0.9, "least": 1}), "unknown entry 'least'"),
        (change("plan.guidance_interval", [2.0, 1.0]), "0 <= low < high"),
        (change("plan.guidance_interval", [-1.0, None]), "0 <= low < high"),
        (change("plan.guidance_interval", [1.0]), "here.plan: "),
        (change("plan.guidance_rescale", 1.5), "guidance_rescale 1.5"),
        (change("sample_shape", [4, 8, 16, 1, 1]), "must have 1 to 4 sizes"),
        (change("sample_shape", [0, 28, 28]), "each at least 1"),
        (change("schedule.alphas", [0.9, 0.5]), "equally long"),
        (change("schedule.sigmas", [float("nan")] * 20), "finite"),
        (change("schedule.alphas", list(SCHEDULE.sigmas)), "alphas must fall"),
        (change("schedule", "linear"), "expected a JSON object, found str"),
        (change("plan.timesteps", [5, 7]), "strictly descending"),
        (change("plan.timesteps", [7, 7]), "strictly descending"),
        (change("plan.timesteps", []), "strictly descending"),
        (change("plan.timesteps", [25, 7, 5, 3, 2]), "lies beyond"),
        (change("plan.guidance", "much"), "could not convert"),
        (change("plan.guidance", float("inf")), "finite"),
        (change("plan.eta", 1.5), "eta 1.5"),
        (change("plan.clip", "false"), "expected true or false"),
        (change("data_range", [1.0, -1.0]), "empty"),
        (change("latent_scale", 0.0), "latent scale"),
        (change("latent_factor", 0), "latent factor 0"),
        (change("baked_in_guidance", float("nan")), "baked-in guidance nan must be finite"),
        (change("baked_in_guidance", "much"), "could not convert"),
        (change("size_multiple", 0), "size multiple 0"),
        (change("plan.end", 50.0), "end 50.0 must be a timestep not above the last one"),
        (change("plan.end", -1.0), "end -1.0"),
        (change("plan.end", "soon"), "plan: could not convert"),
        (lambda data: data["plan"]["output_corrections"].pop(), "plan: 4 output corrections for 5 timesteps"),
        (lambda data: data["plan"]["output_corrections"][2].update(slope=-1.0), "slope -1 must lie above -1"),
        (lambda data: data["plan"]["output_corrections"][2].update(slope=float("nan")), "be finite"),
        (lambda data: data["plan"]["output_corrections"][2].update(slope="steep"), "plan: could not convert"),
        (lambda data: data["plan"]["output_corrections"][2].update(bias=[0.0, float("inf"), 0.0, 0.0]), "be finite"),
        (lambda data: data["plan"]["output_corrections"][2].update(bias=[0.0] * 3), "a bias for each of 4 channels"),
        (lambda data: data["plan"]["output_corrections"][2].pop("bias"), "plan: the entry 'bias' is missing"),
        (lambda data: data["plan"]["output_corrections"][2].update(colour=1), "plan: unknown entry 'colour'"),
        (change("plan.output_corrections", 3), "plan: .*int"),
        (change("fixed_timesteps", [19.0, 14.0]), "timestep 15 is not one of the 2 that this network was exported for"),
        (change("fixed_timesteps", 3), "here: .*int"),
        (change("spacing.shift", 0.0), "spacing: offset 1 must not be negative and shift 0.0"),
        (change("spacing.offset", -1), "spacing: offset -1"),
        (change("spacing.dynamic", [0.5, 1.15, 256]), "spacing: "),
        (change("spacing.colour", 1), "spacing: unknown entry 'colour'"),
        (change("conditioning.zero_negative", "no"), "conditioning: expected true or false"),
    ],
)
def test_broken_specs_are_refused_by_name(edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = json.loads(json.dumps(TEXT.to_json()))
    edit(data)
    with pytest.raises(InvalidInputError, match=message):
        DenoiserSpec.from_json(data, "here")


@pytest.mark.parametrize("data", [None, [], "spec", 3])
def test_json_that_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(InvalidInputError, match="expected a JSON object"):
        DenoiserSpec.from_json(data)


def test_a_new_plan_makes_a_new_spec() -> None:
    plan = SamplingPlan("ddim", (10.0, 0.0))
    assert SPEC.with_plan(plan) == replace(SPEC, plan=plan) and SPEC.plan.solver == "dpmpp_2m" and plan.steps == 2


def test_corrections_are_dropped_with_other_timesteps() -> None:
    plan = TEXT.plan
    assert plan.over(plan.timesteps) == plan and len(plan.output_corrections) == plan.steps == 5
    fewer = plan.over(plan.timesteps[:2])
    assert fewer == replace(plan.without_corrections, timesteps=plan.timesteps[:2]) and fewer.output_corrections == ()


def test_a_network_exported_for_one_plan_refuses_other_timesteps() -> None:
    fixed = replace(SPEC, fixed_timesteps=SPEC.plan.timesteps)
    assert fixed.with_plan(SPEC.plan.over(SPEC.plan.timesteps[1:3])).plan.steps == 2
    with pytest.raises(InvalidInputError, match=r"timestep 4 is not one of the 5 .* without --fixed-timesteps"):
        fixed.with_plan(SPEC.plan.over((*SPEC.plan.timesteps[:2], 4.0)))


def test_a_schedule_may_be_flat_but_must_be_monotonic() -> None:
    assert len(NoiseSchedule((1.0, 1.0), (0.5, 0.5))) == 2
    with pytest.raises(InvalidInputError, match="sigmas must grow"):
        NoiseSchedule((1.0, 0.9), (0.5, 0.4))
