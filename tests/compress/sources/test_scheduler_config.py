"""compress/sources/scheduler_config.py: the solver read from a config samples as diffusers' own scheduler does.

The network is analytic, x_0 = 0.9 sin(2x + t / 400), in every prediction type. diffusers keeps its tables in float32:
the tolerance of 1e-4 is about a hundred rounding errors of values of order one; looser tolerances are explained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffpress.compress.sources.scheduler_config import SchedulerFacts, read_scheduler
from diffpress.runtime.denoiser import thresholded
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel, betas_schedule, flow_schedule, noise_level_at
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.sampler import sample
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.timesteps import TimestepSpacing, reshifted, spaced_timesteps

WHERE = Path("model/scheduler/scheduler_config.json")
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAMES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample", "flow": "flow_prediction"}
COUNTS = (1, 2, 3, 4, 5, 8, 10, 20, 25, 50)
TOLERANCE = 1e-4
SHAPE = (2, 1, 4, 4)


def draw_noise(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).standard_normal((count, *SHAPE), dtype=np.float32))


def build(name: str, **settings: Any) -> tuple[Any, SchedulerFacts]:
    """Build diffusers' scheduler, and read the config it saves."""
    scheduler = getattr(diffusers, name)(**settings)
    return scheduler, read_scheduler(json.loads(scheduler.to_json_string()), WHERE, text_or_latent=True)


def network_of(facts: SchedulerFacts) -> Callable[[np.ndarray, float], np.ndarray]:
    def network(x: np.ndarray, t: float) -> np.ndarray:
        level = noise_level_at(facts.schedule, float(t))
        x0 = 0.9 * np.sin(2 * x.astype(np.float64) + t / 400)
        if facts.prediction == "sample":
            return x0.astype(np.float32)
        eps = (x - level.alpha * x0) / level.sigma
        out = {"epsilon": eps, "v": level.alpha * eps - level.sigma * x0, "flow": eps - x0}[facts.prediction]
        return out.astype(np.float32)

    return network


def our_sample(
    facts: SchedulerFacts,
    steps: int,
    noise: list[np.ndarray],
    tokens: int | None = None,
    network_time: Callable[[float], float] = float,
) -> np.ndarray:
    timesteps = spaced_timesteps(facts.spacing, steps, facts.schedule, tokens)
    plan = SamplingPlan(facts.solver, timesteps, clip=facts.clip, end=facts.end, start=facts.start)
    network = network_of(facts)

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        x0 = to_x0(facts.prediction, x, network(x, network_time(level.t)), level)
        if facts.threshold is not None:
            return thresholded(x0, facts.threshold, (-1.0, 1.0))
        return np.clip(x0, -1, 1) if facts.clip else x0

    return list(sample(denoise, noise[0], facts.schedule, plan, lambda k: noise[k]))[-1].x


def their_sample(
    scheduler: Any, facts: SchedulerFacts, noise: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """Run diffusers' sampling loop with the same noise."""
    fresh = iter(noise[1:])
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(next(fresh)))
    network, x = network_of(facts), torch.from_numpy(noise[0]) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.from_numpy(network(scaled.numpy(), float(t))), t, x).prev_sample
    return x.numpy()


def distance(
    scheduler: Any,
    facts: SchedulerFacts,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    network_time: Callable[[float], float] = float,
) -> float:
    noise = draw_noise(steps + 2)
    scheduler.set_timesteps(steps)
    theirs = their_sample(scheduler, facts, noise, monkeypatch)
    return float(np.abs(our_sample(facts, steps, noise, network_time=network_time) - theirs).max())


CASES = [
    (name, prediction, spacing)
    for name in (
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
    )
    for prediction in ("epsilon", "v", "sample")
    for spacing in ("leading", "trailing", "linspace")
    # DDIM continues at t - T // N, which is not a linspace timestep; two classes do not support sample prediction
    if (name, spacing) != ("DDIMScheduler", "linspace")
    and (name, prediction) not in [("EulerAncestralDiscreteScheduler", "sample"), ("HeunDiscreteScheduler", "sample")]
]


def settings_of(name: str, prediction: str, spacing: str) -> dict[str, Any]:
    settings = LATENT | {"prediction_type": NAMES[prediction], "timestep_spacing": spacing}
    settings["steps_offset"] = 1  # only used with leading spacing
    return settings | ({"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {})


@pytest.mark.parametrize("steps", [2, 4, 10, 20])
@pytest.mark.parametrize(("name", "prediction", "spacing"), CASES)
def test_samples_match_those_of_diffusers(
    name: str, prediction: str, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, facts = build(name, **settings_of(name, prediction, spacing))
    # with Heun in one step x reaches values of 70, and diffusers' error grows accordingly
    tolerance = TOLERANCE if (name, steps) != ("HeunDiscreteScheduler", 2) else 1e-3
    assert distance(scheduler, facts, steps, monkeypatch) <= tolerance


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", sorted({name for name, *_ in CASES}))
def test_timesteps_are_those_of_diffusers(name: str, spacing: str, steps: int) -> None:
    if steps == 1 and spacing == "linspace" and "Multistep" not in name and name != "LCMScheduler":
        pytest.skip("diffusers' linspace with one step starts at t = 0, without noise; ours at the noisy end")
    scheduler, facts = build(name, **settings_of(name, "epsilon", spacing))
    scheduler.set_timesteps(steps)
    ours = spaced_timesteps(facts.spacing, steps, facts.schedule)
    theirs = list(dict.fromkeys(scheduler.timesteps.tolist()))  # Heun repeats each timestep
    assert np.allclose(ours, theirs, rtol=0, atol=1e-4)  # fractional timesteps are float32


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("offset", [0, 1])
def test_ddim_can_end_at_the_noise_of_timestep_0(offset: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, facts = build("DDIMScheduler", set_alpha_to_one=False, steps_offset=offset, clip_sample=False, **LATENT)
    assert facts.end == 0.0 and distance(scheduler, facts, steps, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize("steps", [n for n in COUNTS if n not in (8, 25)])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_pndm_without_runge_kutta_steps_is_matched_exactly(
    prediction: str, offset: int, clean: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"set_alpha_to_one": clean, "steps_offset": offset, "prediction_type": NAMES[prediction]}
    scheduler, facts = build("PNDMScheduler", skip_prk_steps=True, **settings, **LATENT)
    assert facts.note is None and facts.end == (None if clean else 0.0)
    assert distance(scheduler, facts, steps, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize("steps", [4, 20])
def test_dpm_solver_can_end_at_the_noise_of_timestep_0(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 15 steps the last step is of first order."""
    scheduler, facts = build("DPMSolverMultistepScheduler", final_sigmas_type="sigma_min", **LATENT)
    assert facts.end == 0.0 and distance(scheduler, facts, steps, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_zero_terminal_snr_is_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(name, "v", "trailing") | {"rescale_betas_zero_snr": True}
    scheduler, facts = build(name, **settings)
    assert facts.schedule.alphas[-1] <= 2**-12
    assert distance(scheduler, facts, 10, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_sigma_spacings_match_diffusers(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise levels equal those of diffusers; the timesteps passed to the network may differ.

    Euler interpolates timesteps differently, by at most 0.05. DPM-Solver passes integer timesteps, rounded for Karras
    and truncated for the others.
    """
    pytest.importorskip("scipy")
    scheduler, facts = build(name, timestep_spacing="linspace", **{option: True}, **LATENT)
    network_time = (round if "karras" in option else np.floor) if "DPM" in name else float
    assert facts.note is None and distance(scheduler, facts, 12, monkeypatch, network_time) <= 2 * TOLERANCE
    assert distance(scheduler, facts, 12, monkeypatch) <= (3e-3 if option != "use_beta_sigmas" else 2e-2)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_sigmas_match_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, facts = build(name, use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    solver = {"D": "dpmpp_2m", "U": "unipc_2"}[name[0]]
    assert facts.prediction == "flow" and facts.solver == solver and facts.spacing.shift == 3.0
    # diffusers passes integer timesteps, truncated; UniPC's first is 1e-6 below pure noise
    network_time = np.floor if name.startswith("DPM") else lambda t: np.floor(t - 1e-3)
    assert distance(scheduler, facts, 10, monkeypatch, network_time) <= TOLERANCE
    assert distance(scheduler, facts, 10, monkeypatch) <= 5e-3


@pytest.mark.parametrize(
    ("name", "settings", "solver"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, "ddim"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m"),
        ("DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, "ddpm"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ("UniPCMultistepScheduler", {"solver_order": 1}, "unipc_1"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc_3"),
        ("DEISMultistepScheduler", {"solver_order": 1}, "ddim"),
        ("DEISMultistepScheduler", {"solver_order": 3}, "deis_3"),
        ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}, "ddpm_large"),
        ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.4}, "dpmpp_2m"),
        ("UniPCMultistepScheduler", {"thresholding": True, "sample_max_value": 1.2}, "unipc_2"),
        ("DEISMultistepScheduler", {"thresholding": True, "dynamic_thresholding_ratio": 0.8}, "deis_2"),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 2.0}, "ddpm"),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "heun_flow"),
    ],
)
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_settings_select_the_equivalent_solver(
    name: str, settings: dict[str, Any], solver: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, facts = build(name, **settings, **({} if "Flow" in name else LATENT))
    assert facts.solver == solver and ("sde" in str(settings)) is (facts.note is not None)
    # diffusers subtracts large integrals in float32; with float64 coefficients the difference is 3e-6
    tolerance = TOLERANCE if (solver, steps) != ("deis_3", 20) else 1e-3
    assert distance(scheduler, facts, steps, monkeypatch) <= tolerance


def test_the_sde_solver_of_dpm_is_read_even_without_its_noise_sampler() -> None:
    """Its trajectories are tested in tests/runtime/solvers/test_against_diffusers.py."""
    config = LATENT | {"_class_name": "DPMSolverSDEScheduler", "timestep_spacing": "linspace"}
    facts = read_scheduler(config | {"use_karras_sigmas": True}, WHERE, True)
    assert (facts.solver, facts.spacing, facts.start) == (
        "dpmpp_sde",
        TimestepSpacing("karras", integer=False),
        "noise",
    )
    assert "own generator" in str(facts.note) and "used instead" not in str(facts.note)


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("shift", [1.5, 3.0])
def test_flow_samples_match_the_pipeline_of_sd3(shift: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, facts = build("FlowMatchEulerDiscreteScheduler", shift=shift)
    assert facts.note is None and distance(scheduler, facts, steps, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 5000])
def test_flow_samples_match_the_pipeline_of_flux(tokens: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, facts = build("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
    noise = draw_noise(steps + 1)
    theirs = their_sample(scheduler, facts, noise, monkeypatch)
    assert np.abs(our_sample(facts, steps, noise, tokens) - theirs).max() <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 4])
def test_flows_without_a_shift_use_the_sigmas_of_their_pipeline(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.1-schnell; `pipeline_sigmas` overrides it."""
    scheduler, facts = build("FlowMatchEulerDiscreteScheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    noise = draw_noise(1)
    theirs = their_sample(scheduler, facts, noise, monkeypatch)
    assert np.abs(our_sample(facts, steps, noise) - theirs).max() <= TOLERANCE
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert read_scheduler(config, WHERE, True, pipeline_sigmas=False).spacing.kind == "flow_linspace"


def test_dynamic_timesteps_are_reshifted_to_another_size() -> None:
    _, facts = build("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    small, large = (spaced_timesteps(facts.spacing, 8, facts.schedule, tokens) for tokens in (256, 4096))
    assert np.allclose(reshifted(small, facts.spacing, 256, 4096, facts.schedule), large, rtol=1e-12)
    assert reshifted(small, TimestepSpacing(), 256, 4096, facts.schedule) is small


def test_the_scheduler_of_stable_diffusion_1_is_followed_exactly() -> None:
    config = LATENT | {
        "_class_name": "PNDMScheduler",
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
        "trained_betas": None,
    }
    facts = read_scheduler(config, WHERE, True)
    assert (facts.solver, facts.end, facts.clip, facts.start) == ("plms", 0.0, False, "marginal")
    assert facts.spacing == TimestepSpacing("leading", offset=1) and facts.note is None
    assert np.allclose(facts.schedule.alphas, betas_schedule("scaled_linear", 1000, 0.00085, 0.012).alphas, atol=1e-6)


def test_pndm_with_runge_kutta_steps_is_replaced_by_ipndm() -> None:
    assert read_scheduler({"_class_name": "PNDMScheduler"}, WHERE, True).solver == "ipndm"


def test_settings_left_over_from_another_class_are_ignored() -> None:
    """SDXL's Euler config has leftovers of a PNDM config."""
    config = LATENT | {"_class_name": "EulerDiscreteScheduler", "set_alpha_to_one": False, "clip_sample": True}
    facts = read_scheduler(config | {"steps_offset": 1, "timestep_spacing": "leading"}, WHERE, True)
    assert facts.end is None and not facts.clip and facts.note is None and facts.spacing.offset == 1


def test_trained_betas_define_the_schedule() -> None:
    betas = np.linspace(0.001, 0.3, 40)
    facts = read_scheduler(
        {"_class_name": "DDIMScheduler", "trained_betas": betas.tolist(), "num_train_timesteps": 40}, WHERE, True
    )
    assert np.allclose(np.square(facts.schedule.alphas), np.cumprod(1 - betas), atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSinglestepScheduler",
    ],
)
def test_a_substituted_solver_is_reported(name: str) -> None:
    facts = read_scheduler({"_class_name": name}, WHERE, True)
    assert facts.solver == "dpmpp_2m" and str(facts.note).startswith(name) and "used instead" in str(facts.note)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"_class_name": "TCDScheduler"}, "TCDScheduler: unknown scheduler"),
        ({}, "no scheduler class: unknown scheduler"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "used instead"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "shift_terminal 0.1"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "own generator"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "solver_order 3",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "lower_order_final": False}, "lower_order_final False"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "solver_type bh1"),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0 False"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "disable_corrector [0]"),
        ({"_class_name": "DEISMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "steps_offset": 1}, "fixed_large"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "use_beta_sigmas": True}, "use_beta"),
        ({"_class_name": "PNDMScheduler"}, "its Runge-Kutta warm-up is replaced"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "timestep_spacing": "linspace"}, "spacing linspace"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "linspace", "clip_sample": False}, "linspace"),
    ],
)
def test_settings_that_are_not_followed_are_named(settings: dict[str, Any], note: str) -> None:
    assert note in str(read_scheduler(settings, WHERE, True).note)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "score"},
        {"prediction_type": "flow_prediction"},
        {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
        {"beta_schedule": "square"},
        {"beta_start": "low"},
        {"trained_betas": [2.0, 3.0]},
        {"trained_betas": [float("nan")] * 1000},
        {"num_train_timesteps": "many"},
        {"timestep_spacing": "tight"},
        {"steps_offset": -1},
        {"steps_offset": "one"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "three"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -3.0},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 0},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "base_shift": None},
    ],
)
def test_invalid_settings_are_refused_with_the_file_in_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_scheduler({"_class_name": "DDIMScheduler"} | settings, WHERE, True)
    assert str(caught.value).startswith(f"{WHERE}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_pixel_space_models_are_sampled_with_ddim_whatever_the_class(name: str) -> None:
    config = {"_class_name": name, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"}
    facts = read_scheduler(config, WHERE, False)
    theirs: Any = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    table = theirs.alphas_cumprod.double().numpy()
    assert np.array_equal(facts.schedule.alphas, np.sqrt(table))
    expected = ("epsilon", TimestepSpacing(), "ddim", True, None, "marginal", None)
    assert (facts.prediction, facts.spacing, facts.solver, facts.clip, facts.end, facts.start, facts.note) == expected


def test_pixel_space_flows_and_missing_configs_use_defaults() -> None:
    flow = read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "clip_sample": False}, WHERE, False)
    assert (flow.prediction, flow.solver, flow.clip) == ("flow", "ddim", False)
    assert flow.schedule == flow_schedule(1001)
    assert read_scheduler(None, WHERE, False).prediction == "epsilon"
