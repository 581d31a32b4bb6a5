"""Map a diffusers scheduler config to a noise schedule, a timestep spacing and a solver.

diffusers builds the scheduler from the config, so its defaults and its noise table apply. The table `SCHEDULERS`
(scheduler_classes.py) then gives the equivalent solver, and what else the class does with the config: its timestep
spacing, where its plans start and end, and how it clips x_0. Everything that changes the image is followed, or refused
with the name of the entry.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffpress.compress.sources.layout import first_line
from diffpress.compress.sources.scheduler_classes import (
    EQUIVALENTS,
    OWN_NOISE,
    SAME_PARAMETERIZATION,
    SCHEDULERS,
    SchedulerClass,
    Settings,
    only,
)
from diffpress.runtime.carried_settings import DPM_KINDS, carried_settings
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseSchedule, flow_schedule
from diffpress.runtime.sampling_plan import SamplingPlan, Threshold
from diffpress.runtime.sigma_spacing import SMALLEST_ALPHA_SQUARED, SigmaSpacing
from diffpress.runtime.solver_settings import SolverSettings
from diffpress.runtime.solvers import CLIPPING
from diffpress.runtime.timesteps import LCM_TIMESTEPS, TimestepSpacing

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
SIGMA_OPTIONS = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "lu",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
# These have the entries and the table of LMS, with other defaults; one may be a placeholder for a missing dependency,
# and the other is slow to build.
_DEFAULTS = {"beta_start": 0.00085, "beta_end": 0.012}
SAME_AS_LMS = {"DPMSolverSDEScheduler": _DEFAULTS, "KDPM2DiscreteScheduler": _DEFAULTS}
CHOOSE = ', or choose the solver yourself in diffpress.json: {"plan": {"solver": "dpmpp_2m", "steps": 20}}'


@dataclass(frozen=True)
class SchedulerFacts:
    """Prediction type, noise schedule and sampling settings read from a scheduler config.

    `start`, `end` and `threshold` are as in `diffpress.runtime.sampling_plan.SamplingPlan`; `clip` is whether x_0 is
    clipped at each step; `note` describes how sampling differs from the config; `solver_settings` are as in
    `diffpress.runtime.spec.DenoiserSpec`.
    """

    prediction: str
    schedule: NoiseSchedule
    spacing: TimestepSpacing
    solver: str
    clip: bool
    end: float | None = None
    start: str = SamplingPlan.start
    threshold: Threshold | None = None
    note: str | None = None
    solver_settings: tuple[SolverSettings, ...] = ()


def read_scheduler(
    config: dict[str, Any] | None,
    where: Path,
    follow: bool,
    pipeline_sigmas: bool | None = None,
    plan_chosen: bool = False,
) -> SchedulerFacts:
    """Read a scheduler_config.json.

    Args:
        config: The parsed file; None for the defaults of a denoiser without a pipeline.
        where: Its path, for error messages.
        follow: Whether to follow the scheduler class; False (pixel-space models) means DDIM with trailing spacing,
            whatever the class.
        pipeline_sigmas: Whether the diffusers pipeline passes its own sigmas to a flow scheduler, as Flux does and SD3
            does not; None infers it from the config: yes if the shift is dynamic or 1.
        plan_chosen: Whether the user chose a plan, so that only the prediction and the noise schedule have to be read
            if the scheduler cannot be followed.

    Raises:
        InvalidInputError: The settings are invalid, or cannot be followed.
    """
    name = str((config or {}).get("_class_name") or ("DDIMScheduler" if config is None else ""))
    family = SCHEDULERS[name].family if name in SCHEDULERS else None
    replaceable = name in SAME_PARAMETERIZATION or family not in (None, "flow")
    advice = f"change the scheduler's config{CHOOSE if replaceable else ''}"
    if family is None and not (replaceable and (plan_chosen or not follow)):
        what = f"scheduler class '{name}' is not supported" if name else "the entry _class_name is missing"
        raise InvalidInputError(f"{where}: {what} (supported: {', '.join(SCHEDULERS)}); {advice}")
    try:
        if config is None and follow:
            return scheduler_facts({"clip_sample": False}, name)
        if not follow or family is None:
            facts = _default_facts(config or {}, name)
            return replace(facts, clip=facts.clip and not follow)
        own = scheduler_facts(config or {}, name, pipeline_sigmas)
        return own if family == "flow" else replace(own, solver_settings=_all_settings(config or {}, own))
    except InvalidInputError as error:
        if follow and plan_chosen and replaceable:
            return replace(_default_facts(config or {}, name), clip=False)
        raise InvalidInputError(f"{where}: {error}; {advice}") from error
    except Exception as error:  # torch and diffusers raise many types for invalid settings
        raise InvalidInputError(f"{where}: no noise schedule can be built from it ({first_line(error)})") from error


def _default_facts(config: Settings, name: str) -> SchedulerFacts:
    """Facts of a model that is sampled with DDIM and trailing spacing, whatever its scheduler."""
    if name in SCHEDULERS and SCHEDULERS[name].family == "flow":
        schedule = flow_schedule(int(config.get("num_train_timesteps", 1000)) + 1)
        return SchedulerFacts("flow", schedule, TimestepSpacing(), "ddim", bool(config.get("clip_sample", True)))
    # the table is that of the class, whose defaults differ; DDPM has the entries for clipping
    scheduler, settings = _build_scheduler(name, config)
    _, clipping = _build_scheduler("DDPMScheduler", config)
    if clipping["clip_sample"] and not clipping["thresholding"]:
        only(clipping, "clip_sample_range", 1.0)
    threshold = _threshold(clipping)
    return SchedulerFacts(
        PREDICTIONS[only(settings, "prediction_type", "epsilon", "v_prediction", "sample")],
        _table(scheduler),
        TimestepSpacing(),
        "ddim",
        clip=bool(clipping["clip_sample"]) and threshold is None,
        threshold=threshold,
    )


def scheduler_facts(config: Settings, name: str, pipeline_sigmas: bool | None = None, **changed: Any) -> SchedulerFacts:
    """Return the facts of a model that is sampled with this class, built from the config with some changed entries."""
    entry = SCHEDULERS[name]
    scheduler, settings = _build_scheduler(name, config, **changed)
    solver = entry.solver(settings)
    _check_entries(name, entry, settings)
    if solver in ("heun", "kdpm2", "deis_2", "deis_3") and settings["timestep_spacing"] != "leading":
        # its first timestep is almost pure noise, where these solvers would amplify rounding errors
        only(settings, "beta_schedule", "linear", "scaled_linear", "exp")
    note = f"{name}: {entry.note}" if entry.note else None
    if solver in ("ddpm", "dpmpp_2m_sde", "consistency") and note is None:
        note = f"{name}: {OWN_NOISE}"
    if entry.family == "flow":
        schedule = flow_schedule(int(settings["num_train_timesteps"]) + 1)  # timesteps 0 to T inclusive
        return SchedulerFacts(
            "flow", schedule, _flow_spacing(settings, solver, pipeline_sigmas), solver, False, note=note
        )
    threshold = _threshold(settings)
    if settings.get("use_flow_sigmas"):
        return _flow_sigma_facts(name, settings, solver, threshold, note)
    prediction = PREDICTIONS[only(settings, "prediction_type", "epsilon", "v_prediction", "sample")]
    schedule = _table(scheduler)
    if prediction == "epsilon" and 0.0 in schedule.alphas[:-1]:
        raise InvalidInputError(
            f"beta_start, beta_end, trained_betas or num_train_timesteps: alpha is 0 from timestep "
            f"{schedule.alphas.index(0.0)} on, where an epsilon prediction does not determine the image"
        )
    return SchedulerFacts(
        prediction=prediction,
        schedule=schedule,
        spacing=_spacing(scheduler, entry.family, solver, settings),
        solver=solver,
        clip=bool(settings.get("clip_sample")) and threshold is None and solver != CLIPPING,
        end=_end(name, entry.family, settings),
        start="noise" if entry.family == "euler" and settings["timestep_spacing"] != "leading" else SamplingPlan.start,
        threshold=threshold,
        note=note,
    )


def _check_entries(name: str, entry: SchedulerClass, settings: Settings) -> None:
    """Refuse entries that this project does not know and that are not at their default."""
    defaults = inspect.signature(getattr(diffusers, name).__init__).parameters
    for key in sorted(set(settings) - entry.followed):
        default = defaults[key].default if key in defaults else None  # a placeholder for a missing dependency
        only(settings, key, default)
    betas = settings.get("trained_betas")
    if betas is not None and len(betas) != settings["num_train_timesteps"]:
        raise InvalidInputError(
            f"trained_betas has {len(betas)} values for num_train_timesteps {settings['num_train_timesteps']}"
        )


def _end(name: str, family: str, settings: Settings) -> float | None:
    """The timestep at whose noise level plans end; None for clean data, as a consistency model always does."""
    noisy = settings.get("set_alpha_to_one") is False or settings.get("final_sigmas_type") == "sigma_min"
    noisy |= name == "DEISMultistepScheduler"
    return 0.0 if noisy and family != "lcm" else None


def _threshold(settings: Settings) -> Threshold | None:
    if not settings.get("thresholding"):
        return None
    ratio, most = float(settings["dynamic_thresholding_ratio"]), float(settings["sample_max_value"])
    if most < 1.0:
        raise InvalidInputError(f"sample_max_value {most:g} is not supported, only values of at least 1")
    return Threshold(ratio, most)


def _spacing(scheduler: Any, family: str, solver: str, settings: Settings) -> TimestepSpacing:
    # singlestep solvers have no such setting: their timesteps are linspace's
    plain = only(settings, "timestep_spacing", "linspace", "leading", "trailing")
    kind = {"dpm": DPM_KINDS.get(plain, plain), "lcm": "lcm"}.get(family, plain)
    offset = int(settings["steps_offset"]) if kind.endswith("leading") else 0  # diffusers adds it to no other
    if offset < 0:
        raise InvalidInputError(f"steps_offset {offset} must not be negative")
    spacing = TimestepSpacing(
        kind,
        offset,
        integer=not (family == "euler" and kind == "linspace"),
        # PNDM and DDIM step by T // N
        strided=solver in ("ddim", CLIPPING, "plms", "plms_v")
        and family == "ddim"
        and (kind != "leading" or offset > 1),
        finite=bool(settings.get("rescale_betas_zero_snr")) and family in ("euler", "dpm"),
        count=_count(scheduler, family, settings),
    )
    option = next((ours for theirs, ours in SIGMA_OPTIONS.items() if settings.get(theirs)), None)
    if option is None:
        return spacing
    if settings.get("final_sigmas_type") == "sigma_min" and solver.startswith("unipc"):
        only(settings, "final_sigmas_type", "zero")  # diffusers' last step would divide by zero
    low, high = (None if settings.get(name) is None else float(settings[name]) for name in ("sigma_min", "sigma_max"))
    rounding = ""
    if family == "dpm":
        cosine = settings["beta_schedule"] == "squaredcos_cap_v2" and type(scheduler).__name__.startswith(
            "DPMSolverMulti"
        )
        rounding = "round" if option in ("karras", "lu") and not cosine else "floor"
    elif solver == "kdpm2" and option == "karras":
        rounding = "round"
    sigmas = SigmaSpacing(option, low, high, full_table=family == "dpm")
    return replace(spacing, integer=bool(rounding), sigmas=sigmas, rounding=rounding, finite=False, count=None)


def _count(scheduler: Any, family: str, settings: Settings) -> int | None:
    """The number of timesteps that are spaced, where it is not all."""
    if family == "lcm":
        count = int(settings["original_inference_steps"])
        return None if count == LCM_TIMESTEPS else count
    if not np.isfinite(settings.get("lambda_min_clipped", -np.inf)):
        return None
    lowest = torch.flip(scheduler.lambda_t, [0])
    clipped = int(torch.searchsorted(lowest, settings["lambda_min_clipped"]))
    return len(lowest) - clipped if clipped else None


def _flow_sigma_facts(
    name: str, settings: Settings, solver: str, threshold: Threshold | None, note: str | None
) -> SchedulerFacts:
    if settings["prediction_type"] != "flow_prediction":
        raise InvalidInputError(
            f"use_flow_sigmas with prediction_type {settings['prediction_type']} is not supported, only flow_prediction"
        )
    only(settings, "final_sigmas_type", "zero")
    for option in SIGMA_OPTIONS:
        only(settings, option, False)
    kind = "unipc_flow" if name == "UniPCMultistepScheduler" else "dpm_flow"
    schedule = flow_schedule(int(settings["num_train_timesteps"]) + 1)
    spacing = TimestepSpacing(kind, integer=False, shift=float(settings["flow_shift"]), rounding="floor")
    return SchedulerFacts("flow", schedule, spacing, solver, False, start="unit", threshold=threshold, note=note)


def _flow_spacing(settings: Settings, solver: str, pipeline_sigmas: bool | None) -> TimestepSpacing:
    shift = float(settings["shift"])
    dynamic = None
    if settings.get("use_dynamic_shifting"):
        low, high = float(settings["base_shift"]), float(settings["max_shift"])
        dynamic = low, high, float(settings["base_image_seq_len"]), float(settings["max_image_seq_len"])
    own = (dynamic is not None or shift == 1.0) if pipeline_sigmas is None else pipeline_sigmas
    own &= solver != "heun_flow"  # no pipeline passes sigmas to Heun
    option = next((ours for theirs, ours in SIGMA_OPTIONS.items() if settings.get(theirs)), None)
    terminal = settings.get("shift_terminal")
    return TimestepSpacing(
        "flow_trailing" if own else "flow_linspace",
        integer=False,
        shift=shift,
        dynamic=dynamic,
        linear_shift=dynamic is not None and settings.get("time_shift_type") == "linear",
        terminal=float(terminal) if terminal else None,
        sigmas=SigmaSpacing(option) if option else None,
    )


def _all_settings(config: Settings, own: SchedulerFacts) -> tuple[SolverSettings, ...]:
    """Return the settings of every solver with an equivalent class, where they are not those of the general rules.

    The oracle is `Class.from_config(config)`: what a user of diffusers writes to choose another scheduler.
    """
    clips = own.clip or own.solver == CLIPPING
    found = []
    for solver in (own.solver, *(name for name in EQUIVALENTS if name != own.solver)):
        settings = _own_settings(own) if solver == own.solver else _settings(config, own, solver)
        if settings is None:
            continue
        general = carried_settings(own.spacing, own.schedule, solver)
        general = replace(general, clip=clips and solver != CLIPPING, threshold=own.threshold)
        if settings != general:
            found.append(settings)
    return tuple(found)


def _own_settings(own: SchedulerFacts) -> SolverSettings:
    return SolverSettings(own.solver, own.solver, own.spacing, own.start, own.end, own.clip, own.threshold)


def _settings(config: Settings, own: SchedulerFacts, solver: str) -> SolverSettings | None:
    """Settings of a solver on a model with this config; None if the equivalent class does not support the model."""
    name, changed = EQUIVALENTS[solver]
    try:
        facts = scheduler_facts(config, name, **changed)
    except InvalidInputError as error:
        if str(error).startswith("prediction_type"):
            return None
        return SolverSettings(solver, solver, refused=f"with {name}, {error}")
    except Exception as error:  # diffusers raises many types for settings that another class does not support
        return SolverSettings(solver, solver, refused=f"{name} cannot be built from its config ({first_line(error)})")
    if solver in ("plms", "plms_v", "pndm", "pndm_v") and facts.solver != solver:
        return None
    if (facts.prediction, facts.schedule) != (own.prediction, own.schedule):
        return SolverSettings(solver, solver, refused=f"the noise schedule of {name} would be another one")
    return replace(_own_settings(facts), solver=solver)


def _build_scheduler(name: str, config: Settings, **changed: Any) -> tuple[Any, Settings]:
    """Build diffusers' scheduler; return it with the settings its class has, without leftovers of other classes."""
    cls = getattr(diffusers, name)
    if name in SAME_AS_LMS:
        cls, config = diffusers.LMSDiscreteScheduler, SAME_AS_LMS[name] | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # an algorithm_type that diffusers deprecates
        scheduler = cls.from_config(config, **changed)
    own = inspect.signature(cls.__init__).parameters
    return scheduler, {key: value for key, value in scheduler.config.items() if key in own}


def _table(scheduler: Any) -> NoiseSchedule:
    """Return the noise schedule that diffusers computed from the config, with alpha 0 at zero terminal SNR."""
    abar = scheduler.alphas_cumprod.double().numpy()
    if getattr(scheduler.config, "rescale_betas_zero_snr", False) and abar[-1] == SMALLEST_ALPHA_SQUARED:
        abar[-1] = 0.0
    with np.errstate(invalid="ignore"):  # NoiseSchedule then rejects NaN
        return NoiseSchedule(tuple(np.sqrt(abar).tolist()), tuple(np.sqrt(1.0 - abar).tolist()))
