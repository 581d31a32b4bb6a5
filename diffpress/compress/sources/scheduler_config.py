"""A diffusers scheduler's config, read into what a sampler without diffusers needs.

diffusers builds the scheduler itself, so its own defaults and its own noise table hold; what is left is a table: which
of our solvers walks as the class does, and on which grids (runtime/noise_schedule.py). Settings that are not followed, and
classes that another solver stands in for, are told in one sentence, `note`.
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
    """What a scheduler's config says of a model: its network's prediction, its noise, and how it is sampled.

    `start`, `end` and `threshold` are those of diffpress.runtime.sampling_plan.Plan, `clip` whether x_0 is bounded at each step, `note`
    what of the config is not followed to the letter.
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
    """How a class of scheduler is walked: our solver, the grids its spacings mean, and where that is not the same."""

    solver: str
    spacings: Mapping[str, str]
    note: str | None = None
    followed: Mapping[str, tuple[Any, ...]] = {}  # as FOLLOWED, for this class alone


PLAIN = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}
EULER = dict(PLAIN)  # the same grids, but linspace is not rounded
DPM = {"leading": "dpm_leading", "trailing": "trailing", "linspace": "dpm_linspace"}
STEPPED = {"timestep_spacing": ("leading", "trailing")}  # they step by T // N, which is not where linspace goes on
UNIPC = {"solver_type": ("bh2",), "predict_x0": (True,), "disable_corrector": ([],), "solver_p": (None,)}
SUBSTITUTED = "another solver stands in for it, so images differ from those of its pipeline"
OWN_NOISE = "the noise it adds at each step is drawn by diffpress's own generator"

SCHEDULERS = {
    # it keeps eps when it bounds x_0, by whatever rule
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
        "ipndm", PLAIN, note="its Runge-Kutta warm-up is replaced by plain steps", followed=STEPPED
    ),
    "DPMSolverSinglestepScheduler": SchedulerMapping("dpmpp_2m", DPM, note=SUBSTITUTED),
    "LMSDiscreteScheduler": SchedulerMapping("dpmpp_2m", EULER, note=SUBSTITUTED),
    "KDPM2DiscreteScheduler": SchedulerMapping("dpmpp_2m", EULER, note=SUBSTITUTED),
    "KDPM2AncestralDiscreteScheduler": SchedulerMapping("dpmpp_2m", EULER, note=SUBSTITUTED),
}
# solver_order of a class (and algorithm_type, where it has several) -> our solver
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
UNKNOWN = SchedulerMapping("ddim", PLAIN, note="it is not known, and deterministic DDIM stands in for it")

# The values our solvers walk by, of any class that has such a setting.
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
    """The facts in a scheduler_config.json; raises InvalidInputError naming `where` for settings that make no sense.

    Models of pixels (`text_or_latent` False) are sampled by DDIM on a trailing grid whatever the class; others follow
    theirs. `pipeline_sigmas`: their pipeline lays out a flow's timesteps itself, as Flux's does and SD3's does not;
    None takes that from the config: where the shift is dynamic, or none.
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
    except Exception as error:  # torch's and diffusers' own types for settings that make no sense
        raise InvalidInputError(f"{where}: no noise schedule can be made from it ({first_line(error)})") from error


def _pixel_facts(config: dict[str, Any], flow: bool, kind: str) -> SchedulerFacts:
    if flow:
        schedule = flow_schedule(int(config.get("num_train_timesteps", 1000)) + 1)
    else:
        schedule = _table(diffusers.DDPMScheduler.from_config(config))
    clip = bool(config.get("clip_sample", True))
    return SchedulerFacts("flow" if flow else PREDICTIONS[kind], schedule, TimestepSpacing(), "ddim", clip)


def _facts(config: dict[str, Any], name: str, kind: str) -> SchedulerFacts:
    scheduler, settings = _built(name if name in SCHEDULERS else "DDPMScheduler", config)
    mapping, settings = _mapping_of(name, kind, settings)
    start = SamplingPlan.start
    if _has_flow_sigmas(config, name):
        schedule = flow_schedule(int(config.get("num_train_timesteps", 1000)) + 1)
        kind = "unipc_flow" if name == "UniPCMultistepScheduler" else "dpm_flow"
        spacing, start = TimestepSpacing(kind, integer=False, shift=float(settings["flow_shift"])), "unit"
    else:
        schedule, spacing = _table(scheduler), _spacing(settings, mapping)
        if mapping.spacings is EULER and settings.get("timestep_spacing") != "leading":
            start = "noise"
    # a consistency model ends at its clean guess whatever the config says
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
    """How that class walks with these settings, and the settings without those that this has taken care of."""
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
        # on other grids theirs adds noise to the clean sample that it ends at
        exact = settings["timestep_spacing"] == "leading" and settings["steps_offset"] == 0
        return mapping._replace(solver="ddpm_large"), settings | ({"variance_type": None} if exact else {})
    if settings.get("skip_prk_steps"):  # PNDM without its Runge-Kutta steps, which mixes what the network returns
        return mapping._replace(solver="plms_v" if kind == "v_prediction" else "plms", note=None), settings
    return mapping, settings


def _flow_facts(config: dict[str, Any], name: str, pipeline_sigmas: bool | None) -> SchedulerFacts:
    mapping = FLOWS.get(name, FLOWS["FlowMatchEulerDiscreteScheduler"]._replace(note=SUBSTITUTED))
    _, settings = _built(name if name in FLOWS else "FlowMatchEulerDiscreteScheduler", config)
    shift = float(settings["shift"])
    dynamic = None
    if settings.get("use_dynamic_shifting"):
        low, high = float(settings["base_shift"]), float(settings["max_shift"])
        dynamic = low, high, float(settings["base_image_seq_len"]), float(settings["max_image_seq_len"])
    own = (dynamic is not None or shift == 1.0) if pipeline_sigmas is None else pipeline_sigmas
    own &= mapping.solver == "euler"  # no pipeline lays them out for Heun
    return SchedulerFacts(
        prediction="flow",
        # diffusers counts a flow's time in T-ths up to T itself: T + 1 timesteps
        schedule=flow_schedule(int(settings["num_train_timesteps"]) + 1),
        spacing=TimestepSpacing(
            "flow_trailing" if own else "flow_linspace", integer=False, shift=shift, dynamic=dynamic
        ),
        solver=mapping.solver,
        clip=False,
        note=_note(name, mapping, settings),
    )


def _built(name: str, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Diffusers' scheduler, and its own settings: files carry along those of the class they once were of."""
    cls = getattr(diffusers, name)
    if hasattr(cls, "_backends"):  # an empty shell, where a package it needs is not installed: one with its settings
        cls = diffusers.EulerDiscreteScheduler
    scheduler = cls.from_config(config)
    own = inspect.signature(cls.__init__).parameters
    return scheduler, {key: value for key, value in scheduler.config.items() if key in own}


def _has_flow_sigmas(config: dict[str, Any], name: str) -> bool:
    return bool(config.get("use_flow_sigmas")) and SCHEDULERS.get(name, UNKNOWN).spacings is DPM


def _table(scheduler: Any) -> NoiseSchedule:
    """Any scheduler of the beta family is one table; diffusers itself makes it from the config."""
    abar = scheduler.alphas_cumprod.double().numpy()
    with np.errstate(invalid="ignore"):  # NoiseSchedule refuses what is no number then
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
    # diffusers adds the offset to leading grids alone
    offset = int(settings["steps_offset"]) if ours.endswith("leading") else 0
    return TimestepSpacing(ours, offset, integer=not (mapping.spacings is EULER and ours == "linspace"))


def _note(name: str, mapping: SchedulerMapping, settings: dict[str, Any]) -> str | None:
    """One sentence on what differs from the scheduler, or None."""
    followed = {**FOLLOWED, **mapping.followed}
    if mapping.spacings is EULER and settings.get("timestep_spacing") != "linspace":
        followed |= NO_SIGMAS  # there they run between the ends of that grid, not of the table
    odd = [f"{key} {settings[key]}" for key, values in followed.items() if settings.get(key, values[0]) not in values]
    parts = [mapping.note] if mapping.note else []
    parts += [] if mapping.note is SUBSTITUTED else [f"not followed exactly: {', '.join(odd)}"] * bool(odd)
    return f"{name or 'no scheduler class'}: {'; '.join(parts)}" if parts else None
