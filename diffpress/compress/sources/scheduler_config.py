"""Map a diffusers scheduler config to a noise schedule, a timestep spacing and a solver.

diffusers builds the scheduler from the config, so its defaults and its noise table apply. The table `SCHEDULERS` then
maps each class to the equivalent solver and timestep spacings (runtime/timesteps.py). Settings that are not followed,
and classes that are replaced by another solver, are reported in one sentence, `note`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np

from diffpress.compress.sources.layout import first_line
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseSchedule, flow_schedule
from diffpress.runtime.sampling_plan import SamplingPlan, Threshold
from diffpress.runtime.solvers import CLIPPING
from diffpress.runtime.timesteps import LCM_TIMESTEPS, TimestepSpacing

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


@dataclass(frozen=True)
class SchedulerFacts:
    """Prediction type, noise schedule and sampling settings read from a scheduler config.

    `start`, `end` and `threshold` are as in `diffpress.runtime.sampling_plan.SamplingPlan`; `clip` is whether x_0 is
    clipped at each step; `note` describes how sampling differs from the config.
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


class SchedulerMapping(NamedTuple):
    """Equivalent of a scheduler class: our solver, our spacing for each `timestep_spacing`, and known differences."""

    solver: str
    spacings: Mapping[str, str]
    note: str | None = None
    followed: Mapping[str, tuple[Any, ...]] = {}  # like FOLLOWED, for this class only


PLAIN = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}
EULER = dict(PLAIN)  # the same spacings, but linspace is not rounded
DPM = {"leading": "dpm_leading", "trailing": "trailing", "linspace": "dpm_linspace"}
STEPPED = {
    "timestep_spacing": ("leading", "trailing")
}  # these step by T // N, which differs from the linspace timesteps
UNIPC = {"solver_type": ("bh2",), "predict_x0": (True,), "disable_corrector": ([],), "solver_p": (None,)}
SUBSTITUTED = "another solver is used instead, so images differ from those of the diffusers pipeline"
OWN_NOISE = "the noise added at each step is drawn by diffpress's own generator"

SCHEDULERS = {
    # it keeps eps when it clips or thresholds x_0
    "DDIMScheduler": SchedulerMapping("ddim", PLAIN, followed={**STEPPED, "thresholding": (False,)}),
    "DDPMScheduler": SchedulerMapping("ddpm", PLAIN),
    "EulerDiscreteScheduler": SchedulerMapping("euler", EULER),
    "EulerAncestralDiscreteScheduler": SchedulerMapping("euler_ancestral", EULER, note=OWN_NOISE),
    "HeunDiscreteScheduler": SchedulerMapping("heun", EULER, followed={"clip_sample": (False,)}),
    "DPMSolverMultistepScheduler": SchedulerMapping("dpmpp_2m", DPM),
    "DPMSolverSDEScheduler": SchedulerMapping("dpmpp_sde", EULER, note=OWN_NOISE),
    "DEISMultistepScheduler": SchedulerMapping(
        "deis_2", DPM, followed={"solver_type": ("logrho",), "use_flow_sigmas": (False,)}
    ),
    "UniPCMultistepScheduler": SchedulerMapping("unipc_2", DPM, followed=UNIPC),
    "LCMScheduler": SchedulerMapping("lcm", dict.fromkeys(PLAIN, "lcm")),
    "PNDMScheduler": SchedulerMapping(
        "ipndm", PLAIN, note="its Runge-Kutta warm-up is replaced by multistep updates", followed=STEPPED
    ),
    "DPMSolverSinglestepScheduler": SchedulerMapping("dpmpp_2m", DPM, note=SUBSTITUTED),
    "LMSDiscreteScheduler": SchedulerMapping("dpmpp_2m", EULER, note=SUBSTITUTED),
    "KDPM2DiscreteScheduler": SchedulerMapping("dpmpp_2m", EULER, note=SUBSTITUTED),
    "KDPM2AncestralDiscreteScheduler": SchedulerMapping("dpmpp_2m", EULER, note=SUBSTITUTED),
}
# (class, algorithm_type if it has several) -> our solver for solver_order 1, 2, ...
ORDERS: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("DPMSolverMultistepScheduler", "dpmsolver++"): ("ddim", "dpmpp_2m", "dpmpp_3m"),
    ("DPMSolverMultistepScheduler", "sde-dpmsolver++"): ("ddpm", "dpmpp_2m_sde"),
    ("DEISMultistepScheduler", "deis"): ("ddim", "deis_2", "deis_3"),
    ("UniPCMultistepScheduler", None): ("unipc_1", "unipc_2", "unipc_3"),
}
NO_SIGMAS = {"use_karras_sigmas": (False,), "use_exponential_sigmas": (False,), "use_beta_sigmas": (False, None)}
FLOWS = {
    "FlowMatchEulerDiscreteScheduler": SchedulerMapping("euler", {}, followed=NO_SIGMAS),
    "FlowMatchHeunDiscreteScheduler": SchedulerMapping("heun_flow", {}),
}
UNKNOWN = SchedulerMapping("ddim", PLAIN, note="unknown scheduler, deterministic DDIM is used instead")

# Values that our solvers implement, for every class that has the setting; others are reported in `note`.
FOLLOWED: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "solver_type": ("midpoint",),
    "solver_order": (1, 2, 3),
    "lower_order_final": (True,),
    "variance_type": (None, "fixed_small", "fixed_small_log"),
    "lambda_min_clipped": (-float("inf"),),
    "clip_sample_range": (1.0,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "original_inference_steps": (LCM_TIMESTEPS,),
    "timestep_scaling": (10.0,),
    "time_shift_type": ("exponential",),
    "shift_terminal": (None,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
}


def read_scheduler(
    config: dict[str, Any] | None, where: Path, text_or_latent: bool, pipeline_sigmas: bool | None = None
) -> SchedulerFacts:
    """Read a scheduler_config.json.

    Args:
        config: The parsed file; None for the defaults.
        where: Its path, for error messages.
        text_or_latent: Whether to follow the scheduler class; False (pixel-space models) means DDIM with trailing
            spacing, whatever the class.
        pipeline_sigmas: Whether the diffusers pipeline passes its own sigmas to a flow scheduler, as Flux does and SD3
            does not; None infers it from the config: yes if the shift is dynamic or 1.

    Raises:
        InvalidInputError: The settings are invalid.
    """
    config = config or {}
    name = str(config.get("_class_name", ""))
    kind = str(config.get("prediction_type", "epsilon"))
    flow = "FlowMatch" in name
    flow_sigmas = text_or_latent and kind == "flow_prediction" and _has_flow_sigmas(config, name)
    if not flow and kind not in PREDICTIONS and not flow_sigmas:
        raise InvalidInputError(f"{where}: prediction_type '{kind}' is not one of {', '.join(PREDICTIONS)}")
    try:
        if not text_or_latent:
            return _pixel_facts(config, flow, kind)
        return _flow_facts(config, name, pipeline_sigmas) if flow else _facts(config, name, kind)
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: {error}") from error
    except Exception as error:  # torch and diffusers raise many types for invalid settings
        raise InvalidInputError(f"{where}: no noise schedule can be built from it ({first_line(error)})") from error


def _pixel_facts(config: dict[str, Any], flow: bool, kind: str) -> SchedulerFacts:
    if flow:
        schedule = flow_schedule(int(config.get("num_train_timesteps", 1000)) + 1)
    else:
        schedule = _table(diffusers.DDPMScheduler.from_config(config))
    clip = bool(config.get("clip_sample", True))
    return SchedulerFacts("flow" if flow else PREDICTIONS[kind], schedule, TimestepSpacing(), "ddim", clip)


def _facts(config: dict[str, Any], name: str, kind: str) -> SchedulerFacts:
    scheduler, settings = _build_scheduler(name if name in SCHEDULERS else "DDPMScheduler", config)
    mapping, settings = _mapping_of(name, kind, settings)
    start = SamplingPlan.start
    if _has_flow_sigmas(config, name):
        schedule = flow_schedule(int(config.get("num_train_timesteps", 1000)) + 1)
        flow_spacing = "unipc_flow" if name == "UniPCMultistepScheduler" else "dpm_flow"
        spacing, start = TimestepSpacing(flow_spacing, integer=False, shift=float(settings["flow_shift"])), "unit"
    else:
        schedule, spacing = _table(scheduler), _spacing(settings, mapping)
        if mapping.spacings is EULER and settings.get("timestep_spacing") != "leading":
            start = "noise"
    # a consistency model always ends at its estimate of x_0
    noisy = settings.get("set_alpha_to_one") is False or settings.get("final_sigmas_type") == "sigma_min"
    noisy |= name == "DEISMultistepScheduler"
    threshold = None
    if settings.get("thresholding"):
        threshold = Threshold(float(settings["dynamic_thresholding_ratio"]), float(settings["sample_max_value"]))
    return SchedulerFacts(
        prediction="flow" if kind == "flow_prediction" else PREDICTIONS[kind],
        schedule=schedule,
        spacing=spacing,
        solver=mapping.solver,
        clip=bool(settings.get("clip_sample", False)) and threshold is None,
        end=0.0 if noisy and mapping.solver != "lcm" else None,
        start=start,
        threshold=threshold,
        note=_note(name, mapping, settings),
    )


def _mapping_of(name: str, kind: str, settings: dict[str, Any]) -> tuple[SchedulerMapping, dict[str, Any]]:
    """Return the mapping of a class with these settings, and the settings that it does not yet cover."""
    mapping = SCHEDULERS.get(name, UNKNOWN)
    orders = ORDERS.get((name, settings.get("algorithm_type")))
    if orders is not None:
        order = int(settings["solver_order"])
        if 1 <= order <= len(orders):
            mapping = mapping._replace(solver=orders[order - 1])
        else:
            mapping = mapping._replace(followed={**mapping.followed, "solver_order": tuple(range(1, len(orders) + 1))})
        if settings.get("algorithm_type") == "sde-dpmsolver++":
            mapping = mapping._replace(solver=orders[min(order, len(orders)) - 1], note=OWN_NOISE)
    if name == "DDIMScheduler" and settings["clip_sample"]:  # it keeps eps when it clips x_0
        return mapping._replace(solver=CLIPPING), settings | {"clip_sample": False}
    if name == "DDPMScheduler" and settings["variance_type"] == "fixed_large":
        # with other spacings diffusers adds noise to the final clean sample
        exact = settings["timestep_spacing"] == "leading" and settings["steps_offset"] == 0
        return mapping._replace(solver="ddpm_large"), settings | ({"variance_type": None} if exact else {})
    if settings.get("skip_prk_steps"):  # PNDM without Runge-Kutta steps averages network outputs
        return mapping._replace(solver="plms_v" if kind == "v_prediction" else "plms", note=None), settings
    return mapping, settings


def _flow_facts(config: dict[str, Any], name: str, pipeline_sigmas: bool | None) -> SchedulerFacts:
    mapping = FLOWS.get(name, FLOWS["FlowMatchEulerDiscreteScheduler"]._replace(note=SUBSTITUTED))
    _, settings = _build_scheduler(name if name in FLOWS else "FlowMatchEulerDiscreteScheduler", config)
    shift = float(settings["shift"])
    dynamic = None
    if settings.get("use_dynamic_shifting"):
        low, high = float(settings["base_shift"]), float(settings["max_shift"])
        dynamic = low, high, float(settings["base_image_seq_len"]), float(settings["max_image_seq_len"])
    own = (dynamic is not None or shift == 1.0) if pipeline_sigmas is None else pipeline_sigmas
    own &= mapping.solver == "euler"  # no pipeline passes sigmas to Heun
    return SchedulerFacts(
        prediction="flow",
        # flow timesteps run from 0 to T inclusive: T + 1 entries
        schedule=flow_schedule(int(settings["num_train_timesteps"]) + 1),
        spacing=TimestepSpacing(
            "flow_trailing" if own else "flow_linspace", integer=False, shift=shift, dynamic=dynamic
        ),
        solver=mapping.solver,
        clip=False,
        note=_note(name, mapping, settings),
    )


def _build_scheduler(name: str, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build diffusers' scheduler; return it with the settings its class has, without leftovers of other classes."""
    cls = getattr(diffusers, name)
    if hasattr(cls, "_backends"):  # placeholder for a missing dependency; Euler has the same settings
        cls = diffusers.EulerDiscreteScheduler
    scheduler = cls.from_config(config)
    own = inspect.signature(cls.__init__).parameters
    return scheduler, {key: value for key, value in scheduler.config.items() if key in own}


def _has_flow_sigmas(config: dict[str, Any], name: str) -> bool:
    return bool(config.get("use_flow_sigmas")) and SCHEDULERS.get(name, UNKNOWN).spacings is DPM


def _table(scheduler: Any) -> NoiseSchedule:
    """Return the noise schedule as the table that diffusers computed from the config."""
    abar = scheduler.alphas_cumprod.double().numpy()
    with np.errstate(invalid="ignore"):  # NoiseSchedule then rejects NaN
        return NoiseSchedule(tuple(np.sqrt(abar).tolist()), tuple(np.sqrt(1.0 - abar).tolist()))


def _spacing(settings: dict[str, Any], mapping: SchedulerMapping) -> TimestepSpacing:
    kind = str(settings.get("timestep_spacing", "linspace"))
    if kind not in mapping.spacings:
        raise InvalidInputError(f"timestep_spacing '{kind}' is not one of {', '.join(mapping.spacings)}")
    if settings.get("use_karras_sigmas"):
        return TimestepSpacing("karras", integer=False)
    if settings.get("use_exponential_sigmas") or settings.get("use_lu_lambdas"):
        return TimestepSpacing("exponential", integer=False)
    if settings.get("use_beta_sigmas"):
        return TimestepSpacing("beta", integer=False)
    ours = mapping.spacings[kind]
    # diffusers adds the offset only with leading spacing
    offset = int(settings["steps_offset"]) if ours.endswith("leading") else 0
    return TimestepSpacing(ours, offset, integer=not (mapping.spacings is EULER and ours == "linspace"))


def _note(name: str, mapping: SchedulerMapping, settings: dict[str, Any]) -> str | None:
    """Describe in one sentence how sampling differs from the scheduler; None if it does not."""
    followed = {**FOLLOWED, **mapping.followed}
    if mapping.spacings is EULER and settings.get("timestep_spacing") != "linspace":
        followed |= NO_SIGMAS  # diffusers computes these sigmas between the ends of the timesteps, not of the table
    odd = [f"{key} {settings[key]}" for key, values in followed.items() if settings.get(key, values[0]) not in values]
    parts = [mapping.note] if mapping.note else []
    parts += [] if mapping.note is SUBSTITUTED else [f"not followed exactly: {', '.join(odd)}"] * bool(odd)
    return f"{name or 'no scheduler class'}: {'; '.join(parts)}" if parts else None
