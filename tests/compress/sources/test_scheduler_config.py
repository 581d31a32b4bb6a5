"""compress/sources/scheduler_config.py: the plan read from a config samples as diffusers' own scheduler does.

"Right" is a PSNR of 90 dB to diffusers from the same noise (scheduler_oracle.py). diffusers computes in float32: where
its own rounding is larger, as at the end of a cosine schedule, its trajectory in float64 decides.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffpress.compress.sources.scheduler_classes import SAME_PARAMETERIZATION, SCHEDULERS
from diffpress.compress.sources.scheduler_config import read_scheduler
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import betas_schedule, flow_schedule
from diffpress.runtime.requested_plan import requested_plan
from diffpress.runtime.sampling_plan import plan_steps
from diffpress.runtime.sigma_spacing import SigmaSpacing
from diffpress.runtime.spaced_timesteps import reshifted, space
from diffpress.runtime.timesteps import TimestepSpacing
from tests.compress.sources.scheduler_oracle import (
    LATENT,
    RIGHT_DB,
    SHAPE,
    WHERE,
    agrees,
    build_scheduler,
    compare_db,
    draw_noise,
    our_sample,
    psnr_db,
    read_spec,
    saved_config,
    their_sample,
)

COUNTS = (1, 2, 3, 4, 5, 8, 10, 20, 25, 50)
PLAIN_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
)
NO_SAMPLE_PREDICTION = ("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler")


def settings_of(name: str, prediction: str, spacing: str) -> dict[str, Any]:
    settings: dict[str, Any] = LATENT | {"prediction_type": prediction}
    if "Singlestep" not in name:
        settings |= {"timestep_spacing": spacing, "steps_offset": 1}  # the offset is only used with leading spacing
    return settings | ({"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {})


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", PLAIN_CLASSES)
def test_every_spacing_and_prediction_is_sampled_as_in_diffusers(name: str, prediction: str, spacing: str) -> None:
    """3, 7 and 30 do not divide 1000: there DDIM ends its steps at other noise levels than the next ones start from."""
    if prediction == "sample" and name in NO_SAMPLE_PREDICTION:
        pytest.skip("diffusers does not implement it")
    scheduler = build_scheduler(name, settings_of(name, prediction, spacing))
    for steps in (2, 3, 4, 7, 20, 30):
        spec = read_spec(saved_config(scheduler), steps, with_settings=False)
        assert agrees(scheduler, spec, steps), f"{steps} steps: {compare_db(scheduler, spec, steps):.0f} dB"


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", [name for name in PLAIN_CLASSES if name != "KDPM2DiscreteScheduler"])
def test_timesteps_are_those_of_diffusers(name: str, spacing: str, steps: int) -> None:
    if steps == 1 and spacing == "linspace" and "Multistep" not in name and name != "LCMScheduler":
        pytest.skip("diffusers' linspace with one step starts at t = 0, without noise; ours at the noisy end")
    scheduler = build_scheduler(name, settings_of(name, "epsilon", spacing))
    scheduler.set_timesteps(steps)
    ours = read_spec(saved_config(scheduler), steps, with_settings=False).plan.timesteps
    theirs = list(dict.fromkeys(scheduler.timesteps.tolist()))  # Heun repeats each timestep
    assert np.allclose(ours, theirs, rtol=0, atol=1e-4)  # fractional timesteps are float32


EXACT: list[tuple[str, dict[str, Any], str]] = [
    ("DDIMScheduler", {"set_alpha_to_one": False}, "ddim_clip"),
    ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}, "ddim"),
    ("DDIMParallelScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, "ddim"),
    ("DDPMScheduler", {}, "ddpm"),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}, "ddpm_large"),
    ("DDPMScheduler", {"thresholding": True, "sample_max_value": 2.0}, "ddpm"),
    ("DDPMScheduler", {"clip_sample_range": 2.0, "thresholding": True, "dynamic_thresholding_ratio": 0.8}, "ddpm"),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, "plms"),
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True, "prediction_type": "v_prediction"}, "plms_v"),
    ("PNDMScheduler", {"steps_offset": 1}, "pndm"),
    ("PNDMScheduler", {"prediction_type": "v_prediction", "set_alpha_to_one": True}, "pndm_v"),
    ("LCMScheduler", {"original_inference_steps": 40}, "lcm"),
    ("LCMScheduler", {"original_inference_steps": 33, "clip_sample": True}, "lcm"),
    ("LCMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False, "thresholding": True}, "lcm"),
    ("HeunDiscreteScheduler", {"clip_sample": True}, "heun"),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"lower_order_final": False, "euler_at_final": True}, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "dpmpp_2m_heun"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "dpm_2m"),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, "ddim"),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m"),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, "ddpm"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0}, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0, "timestep_spacing": "leading"}, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.4}, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "dpmpp_2m"),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, "dpmpp_2s"),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1}, "ddim"),
    ("UniPCMultistepScheduler", {"solver_order": 1}, "unipc_1"),
    ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc_3"),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, "unipc_bh1_2"),
    (
        "UniPCMultistepScheduler",
        {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"},
        "unipc_bh1_3",
    ),
    ("UniPCMultistepScheduler", {"thresholding": True, "sample_max_value": 1.2}, "unipc_2"),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}, "unipc_2"),
    ("DEISMultistepScheduler", {"solver_order": 1}, "ddim"),
    ("DEISMultistepScheduler", {"solver_order": 3}, "deis_3"),
    ("DEISMultistepScheduler", {"thresholding": True, "dynamic_thresholding_ratio": 0.8}, "deis_2"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0}, "euler"),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "heun_flow"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}, "euler"),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler"),
    ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True, "shift": 2.0}, "euler"),
    ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}, "euler"),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "consistency"),
    ("FlowMatchLCMScheduler", {"shift": 3.0}, "consistency"),
]


@pytest.mark.parametrize(("name", "settings", "solver"), EXACT)
def test_settings_are_followed_with_the_equivalent_solver(name: str, settings: dict[str, Any], solver: str) -> None:
    scheduler = build_scheduler(name, settings | ({} if "Flow" in name else LATENT))
    for steps in (4, 7, 20):
        spec = read_spec(saved_config(scheduler), steps, with_settings=False, pipeline_sigmas=False)
        assert spec.plan.solver == solver
        assert agrees(scheduler, spec, steps), f"{steps} steps: {compare_db(scheduler, spec, steps):.0f} dB"


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_an_offset_of_more_than_a_step_ends_at_a_noisy_timestep(name: str) -> None:
    """7 steps of 142 timesteps: the last one, at 145, ends at 3."""
    settings = {"steps_offset": 145, "clip_sample": False, "skip_prk_steps": True}
    scheduler = build_scheduler(name, LATENT | {k: v for k, v in settings.items() if k in SCHEDULERS[name].followed})
    spec = read_spec(saved_config(scheduler), 7, with_settings=False)
    assert spec.plan.stride == 142 and agrees(scheduler, spec, 7)
    with pytest.raises(InvalidInputError, match="steps_offset"):
        read_spec(saved_config(scheduler), 20, with_settings=False)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("name", [name for name in PLAIN_CLASSES if "use_karras_sigmas" in SCHEDULERS[name].followed])
def test_sigma_spacings_give_the_noise_levels_and_the_rounded_timesteps_of_diffusers(name: str, option: str) -> None:
    pytest.importorskip("scipy")
    spacings = ({},) if "Singlestep" in name else ({"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"})
    for spacing in spacings:
        scheduler = build_scheduler(name, LATENT | spacing | {option: True})
        spec = read_spec(saved_config(scheduler), 12, with_settings=False)
        assert agrees(scheduler, spec, 12), f"{spacing}: {compare_db(scheduler, spec, 12):.0f} dB"


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("karras", [True, False])
def test_zero_terminal_snr_starts_at_the_sigma_of_diffusers(name: str, karras: bool) -> None:
    """Sigma is 4096, since alpha^2 is 2^-24 there; the schedule keeps alpha = 0 for the solvers that need it."""
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = build_scheduler(name, LATENT | settings | {"use_karras_sigmas": karras})
    spec = read_spec(saved_config(scheduler), 10)
    assert spec.schedule.alphas[-1] == 0.0 and round(spec.plan.ratios[0]) == 4096
    assert agrees(scheduler, spec, 10), f"{compare_db(scheduler, spec, 10):.0f} dB"
    level = plan_steps(spec.schedule, requested_plan(spec, None, "ddim", None, None))[0][0]
    assert level.alpha == 0.0 if not karras else level.t == 999


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler"])
def test_zero_terminal_snr_is_pure_noise_for_ddim(name: str) -> None:
    settings = settings_of(name, "v_prediction", "trailing") | {"rescale_betas_zero_snr": True}
    scheduler = build_scheduler(name, settings)
    spec = read_spec(saved_config(scheduler), 10, with_settings=False)
    assert spec.schedule.alphas[-1] == 0.0 and not spec.plan.ratios and agrees(scheduler, spec, 10)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"]
)
def test_flow_sigmas_are_followed_with_truncated_timesteps(name: str) -> None:
    settings = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    scheduler = build_scheduler(name, settings)
    for steps in (4, 9, 10):
        spec = read_spec(saved_config(scheduler), steps, with_settings=False)
        assert spec.prediction == "flow" and agrees(scheduler, spec, steps)


def test_the_sde_solver_of_dpm_is_read_even_without_its_noise_sampler() -> None:
    """Its trajectories are tested in tests/runtime/solvers/test_against_diffusers.py."""
    config = LATENT | {"_class_name": "DPMSolverSDEScheduler", "timestep_spacing": "linspace"}
    facts = read_scheduler(config | {"use_karras_sigmas": True}, WHERE, True)
    spacing = TimestepSpacing("linspace", integer=False, sigmas=SigmaSpacing("karras"))
    assert (facts.solver, facts.spacing, facts.start) == ("dpmpp_sde", spacing, "noise")
    assert "own generator" in str(facts.note)


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (128, 128), (160, 126)])
def test_dynamic_shifts_follow_the_pipeline_of_flux(size: tuple[int, int], kind: str, steps: int) -> None:
    tokens = size[0] * size[1] // 4
    settings = {"use_dynamic_shifting": True, "shift": 3.0, "time_shift_type": kind}
    scheduler = build_scheduler("FlowMatchEulerDiscreteScheduler", settings)
    spec = read_spec(saved_config(scheduler), steps, sample_shape=(1, size[0] // 2, size[1] // 2))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
    noise = draw_noise(steps + 1)
    assert psnr_db(our_sample(spec, noise), their_sample(scheduler, spec, noise)) >= RIGHT_DB


@pytest.mark.parametrize("steps", [1, 4])
def test_flows_without_a_shift_use_the_sigmas_of_their_pipeline(steps: int) -> None:
    """FLUX.1-schnell; `pipeline_sigmas` overrides it."""
    scheduler = build_scheduler("FlowMatchEulerDiscreteScheduler", {})
    spec = read_spec(saved_config(scheduler), steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    noise = draw_noise(1)
    assert psnr_db(our_sample(spec, noise), their_sample(scheduler, spec, noise)) >= RIGHT_DB
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert read_scheduler(config, WHERE, True, pipeline_sigmas=False).spacing.kind == "flow_linspace"


@pytest.mark.parametrize("settings", [{}, {"shift_terminal": 0.1}, {"use_karras_sigmas": True}])
def test_dynamic_timesteps_are_reshifted_to_another_size(settings: dict[str, Any]) -> None:
    config = saved_config(build_scheduler("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True} | settings))
    facts = read_scheduler(config, WHERE, True)
    small, large = (space(facts.spacing, 8, facts.schedule, tokens).timesteps for tokens in (256, 4096))
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


def test_settings_left_over_from_another_class_are_ignored() -> None:
    """SDXL's Euler config has leftovers of a PNDM config."""
    config = LATENT | {"_class_name": "EulerDiscreteScheduler", "set_alpha_to_one": False, "clip_sample": True}
    facts = read_scheduler(config | {"steps_offset": 1, "timestep_spacing": "leading"}, WHERE, True)
    assert facts.end is None and not facts.clip and facts.note is None and facts.spacing.offset == 1


@pytest.mark.parametrize(
    "config", [{"_class_name": "TCDScheduler"}, {"_class_name": "UniPCMultistepScheduler", "predict_x0": False}]
)
def test_with_a_plan_of_the_user_only_the_parameterization_has_to_be_read(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"choose the solver yourself in diffpress\.json"):
        read_scheduler(LATENT | config, WHERE, True)
    facts = read_scheduler(LATENT | config, WHERE, True, plan_chosen=True)
    assert facts.prediction == "epsilon" and not facts.clip
    assert np.allclose(facts.schedule.alphas, betas_schedule("scaled_linear", 1000, 0.00085, 0.012).alphas, atol=1e-6)
    for other in ("EDMEulerScheduler", "CMStochasticIterativeScheduler"):
        with pytest.raises(InvalidInputError, match=other):
            read_scheduler({"_class_name": other}, WHERE, True, plan_chosen=True)


def test_trained_betas_define_the_schedule() -> None:
    betas = np.linspace(0.001, 0.3, 40)
    config = {"_class_name": "DDIMScheduler", "trained_betas": betas.tolist(), "num_train_timesteps": 40}
    facts = read_scheduler(config, WHERE, True)
    assert np.allclose(np.square(facts.schedule.alphas), np.cumprod(1 - betas), atol=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "sde-dpmsolver",
            "final_sigmas_type": "sigma_min",
        },
        "algorithm_type sde-dpmsolver",
    ),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        "solver_order 3",
    ),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, "solver_order 4"),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min", "lower_order_final": False},
        "lower_order_final False",
    ),
    ({"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned_range"}, "variance_type learned_range"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "prediction_type epsilon"),
    ({"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3}, "solver_order 3"),
    ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0 False"),
    ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "disable_corrector [0]"),
    ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, "lower_order_final False"),
    ({"_class_name": "DEISMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True"),
    ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "steps_offset": 1}, "steps_offset 1"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type learned"),
    ({"_class_name": "DDPMScheduler", "clip_sample_range": 2.0}, "clip_sample_range 2.0"),
    ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding True"),
    ({"_class_name": "LCMScheduler", "timestep_scaling": 5.0}, "timestep_scaling 5.0"),
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "timestep_spacing": "linspace"}, "spacing linspace"),
    ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "interpolation_type log_linear"),
    ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type sigma_min"),
    (
        {
            "_class_name": "EulerDiscreteScheduler",
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
        },
        "timestep_type continuous",
    ),
    ({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "squaredcos_cap_v2"}, "beta_schedule squaredcos_cap_v2"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas True"),
    ({"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5]}, "scale_factors [0.5]"),
    ({"_class_name": "EDMEulerScheduler"}, "'EDMEulerScheduler' is not supported"),
    ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "'EDMDPMSolverMultistepScheduler' is not supported"),
    ({"_class_name": "CMStochasticIterativeScheduler"}, "'CMStochasticIterativeScheduler' is not supported"),
    ({"_class_name": "ScoreSdeVeScheduler"}, "'ScoreSdeVeScheduler' is not supported"),
    ({"_class_name": "TCDScheduler"}, "'TCDScheduler' is not supported"),
    ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, "'KDPM2AncestralDiscreteScheduler' is not supported"),
    ({}, "_class_name is missing"),
    ({"_class_name": "DDIMScheduler", "prediction_type": "score"}, "prediction_type score"),
    ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "prediction_type flow_prediction"),
    ({"_class_name": "DDIMScheduler", "beta_schedule": "square"}, "square"),
    ({"_class_name": "DDIMScheduler", "beta_start": "low"}, "no noise schedule"),
    ({"_class_name": "DDIMScheduler", "trained_betas": [2.0, 3.0]}, "trained_betas has 2 values"),
    ({"_class_name": "DDIMScheduler", "trained_betas": [float("nan")] * 1000}, "noise schedule"),
    ({"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}, "no noise schedule"),
    ({"_class_name": "DDIMScheduler", "timestep_spacing": "tight"}, "timestep_spacing tight"),
    ({"_class_name": "DDIMScheduler", "steps_offset": -1}, "offset -1"),
    ({"_class_name": "DDIMScheduler", "steps_offset": "one"}, "one"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "three"}, "no noise schedule"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -3.0}, "shift -3.0"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 0}, "noise schedule"),
    (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "base_shift": None},
        "NoneType",
    ),
]


@pytest.mark.parametrize(("settings", "named"), REFUSED)
def test_what_cannot_be_followed_is_refused_with_the_file_and_the_entry_in_one_line(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_scheduler(settings, WHERE, True)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ") and named in message and "\n" not in message


def test_an_entry_of_a_newer_diffusers_is_refused_unless_it_is_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = diffusers.LMSDiscreteScheduler

    def init(self: Any, beta_start: float = 0.1, twist: float = 0.0, **kwargs: Any) -> None:
        base.__init__(self)
        self.register_to_config(twist=twist)

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", type("Newer", (base,), {"__init__": init}))
    with pytest.raises(InvalidInputError, match=r"twist 0\.5 is not supported, only 0\.0"):
        read_scheduler({"_class_name": "LMSDiscreteScheduler", "twist": 0.5}, WHERE, True)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", *SAME_PARAMETERIZATION])
def test_pixel_space_models_are_sampled_with_ddim_whatever_the_class(name: str) -> None:
    config = {"_class_name": name, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"}
    facts = read_scheduler(config, WHERE, False)
    theirs: Any = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    table = theirs.alphas_cumprod.double().numpy()
    assert np.array_equal(facts.schedule.alphas, np.sqrt(table))
    expected = ("epsilon", TimestepSpacing(), "ddim", True, None, "marginal", None)
    assert (facts.prediction, facts.spacing, facts.solver, facts.clip, facts.end, facts.start, facts.note) == expected


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "CMStochasticIterativeScheduler", "ScoreSdeVeScheduler"])
def test_a_parameterization_is_never_replaced_not_even_in_pixel_space(name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        read_scheduler({"_class_name": name}, WHERE, False)


def test_pixel_space_flows_and_missing_configs_use_defaults() -> None:
    flow = read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "clip_sample": False}, WHERE, False)
    assert (flow.prediction, flow.solver, flow.clip) == ("flow", "ddim", False)
    assert flow.schedule == flow_schedule(1001)
    assert read_scheduler(None, WHERE, False).prediction == "epsilon"
    latent = read_scheduler(None, WHERE, True)
    assert (latent.solver, latent.clip, latent.spacing.kind) == ("ddim", False, "leading")


def test_thresholding_of_pixel_space_models_is_followed() -> None:
    config = {"_class_name": "DDPMScheduler", "thresholding": True, "sample_max_value": 1.5}
    facts = read_scheduler(config, WHERE, False)
    assert facts.threshold is not None and facts.threshold.max == 1.5 and not facts.clip


def test_samples_have_a_batch() -> None:
    """So that a spacing or threshold over the batch would show."""
    assert SHAPE[0] > 1
