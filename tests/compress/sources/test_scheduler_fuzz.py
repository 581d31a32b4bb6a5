"""One changed entry at a time, for every scheduler class: 90 dB to diffusers, or refused with the name of the entry.

VALUES has values that diffusers accepts for every entry of every signature; an entry without any is an error of this
test. Several base configs, because some entries act only together.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffpress.compress.sources.scheduler_classes import SCHEDULERS
from diffpress.runtime.errors import InvalidInputError
from tests.compress.sources.scheduler_oracle import LATENT, SHAPE, build_scheduler, compare_db, read_spec, saved_config

VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [500],
    "beta_start": [0.0004],
    "beta_end": [0.015],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [np.linspace(1e-3, 1.5e-2, 1000).tolist()],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1, 5],
    "clip_sample": [True, False],
    "clip_sample_range": [0.8, 2.0],
    "thresholding": [True, False],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [1.5, 0.7],
    "set_alpha_to_one": [True, False],
    "rescale_betas_zero_snr": [True],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
    "skip_prk_steps": [True, False],
    "original_inference_steps": [40, 100, 33],
    "timestep_scaling": [5.0],
    "interpolation_type": ["log_linear"],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "sigma_min": [0.05],
    "sigma_max": [10.0, 20.0],
    "timestep_type": ["continuous"],
    "final_sigmas_type": ["zero", "sigma_min"],
    "solver_order": [1, 2, 3, 4],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "euler_at_final": [True],
    "use_lu_lambdas": [True],
    "use_flow_sigmas": [True],
    "flow_shift": [3.0],
    "lambda_min_clipped": [-5.1, -2.0],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear"],
    "predict_x0": [False],
    "disable_corrector": [[0], [1, 2]],
    "solver_p": [None],
    "shift_terminal": [0.1],
    "shift": [1.0, 3.0],
    "base_shift": [0.3],
    "max_shift": [1.5],
    "base_image_seq_len": [100],
    "max_image_seq_len": [2000],
    "invert_sigmas": [True],
    "stochastic_sampling": [True],
    "scale_factors": [[0.5, 0.7]],
    "upscale_mode": ["nearest"],
}
BASES: tuple[dict[str, Any], ...] = (
    {},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"final_sigmas_type": "sigma_min"},
    {"thresholding": True},
    {"skip_prk_steps": True, "steps_offset": 1},
    {"clip_sample": False},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    {"use_dynamic_shifting": True},
)
FUZZED = tuple(name for name in SCHEDULERS if name != "DPMSolverSDEScheduler")  # its noise has a source of its own


def changed_settings(name: str) -> list[tuple[dict[str, Any], str]]:
    """Return settings of a class, each with the entry that was changed."""
    entries = [entry for entry in inspect.signature(getattr(diffusers, name).__init__).parameters if entry != "self"]
    found = []
    for base in BASES:
        if set(base) <= set(entries):
            plain = (LATENT if "beta_start" in entries else {}) | base
            found += [(plain | {entry: value}, entry) for entry in entries for value in VALUES[entry]]
    return found


def their_scheduler(name: str, settings: dict[str, Any]) -> Any | None:
    try:
        return build_scheduler(name, settings)
    except Exception:  # diffusers refuses the value, with many types of errors
        return None


def outcome(scheduler: Any, name: str, steps: int) -> str | float:
    """Return the error of reading the config, '' if diffusers itself cannot sample, or the agreement in dB."""
    config = scheduler.config
    mu = None
    if config.get("use_dynamic_shifting"):
        if "base_shift" not in config:
            return ""  # its pipelines do not pass the shift
        edges = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        mu = calculate_shift(SHAPE[2] * SHAPE[3], *edges)
    try:
        spec = read_spec(saved_config(scheduler), steps, with_settings=False, pipeline_sigmas=False)
        found = compare_db(scheduler, spec, steps, mu)
    except InvalidInputError as error:
        return str(error)
    return compare_db(scheduler, spec, steps, mu, double=True) if found < 90.0 else found


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZED)
def test_a_changed_entry_is_followed_or_refused_by_name(name: str) -> None:
    entries = inspect.signature(getattr(diffusers, name).__init__).parameters
    counts = {"right": 0, "refused": 0}
    for settings, entry in changed_settings(name):
        scheduler = their_scheduler(name, settings)
        if scheduler is None:
            continue
        for steps in (4, 7):
            result = outcome(scheduler, name, steps)
            if result == "" or result != result:  # diffusers itself cannot sample
                continue
            if isinstance(result, str):
                counts["refused"] += 1
                named = any(f"{key} " in result for key in entries) or "is pure noise" in result
                assert "\n" not in result and named, result
            else:
                counts["right"] += 1
                assert result >= 90.0, f"{entry} {settings[entry]} with {settings}, {steps} steps: {result:.0f} dB"
    assert counts["right"] >= 0.5 * (counts["right"] + counts["refused"]), counts


def test_every_entry_of_every_class_is_changed() -> None:
    for name in FUZZED:
        entries = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
        assert entries <= set(VALUES), name
