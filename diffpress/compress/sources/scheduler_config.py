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
from diffpress.runtime.errors import BadInput
from diffpress.runtime.noise_schedule import NoiseSchedule, flow_schedule
from diffpress.runtime.sampling_plan import Plan, Threshold
from diffpress.runtime.solvers import CLIPPING
from diffpress.runtime.timesteps import LCM_TIMESTEPS, Spacing

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


@dataclass(frozen=True)
class SchedulerFacts:
    """What a scheduler's config says of a model: its network's prediction, its noise, and how it is sampled.

    `start`, `end` and `threshold` are those of diffpress.runtime.sampling_plan.Plan, `clip` whether x_0 is bounded at each step, `note`
    what of the config is not followed to the letter.
    """

    prediction: str
    schedule: NoiseSchedule
    spacing: Spacing
    solver: str
    clip: bool
    end: float | None = None
    start: str = Plan.start
    threshold: Threshold | None = None
    note: str | None = None


class Way(NamedTuple):
    """How a class of scheduler is walked: our solver, the grids its spacings mean, and where that is not the same."""

    solver: str
    grids: Mapping[str, str]
    note: str | None = None
    followed: Mapping[str, tuple[Any, ...]] = {}  # as FOLLOWED, for this class alone


PLAIN = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}
EULER = dict(PLAIN)  # the same grids, but linspace is not rounded
DPM = {"leading": "dpm_leading", "trailing": "trailing", "linspace": "dpm_linspace"}
STEPPED = {"timestep_spacing": ("leading", "trailing")}  # they step by T // N, which is not where linspace goes on
UNIPC = {"solver_type": ("bh2",), "predict_x0": (True,), "disable_corrector": ([],), "solver_p": (None,)}
STAND_IN = "another solver stands in for it, so images differ from those of its pipeline"
OWN_NOISE = "the noise it adds at each step is drawn by diffpress's own generator"

WAYS = {
    # it keeps eps when it bounds x_0, by whatever rule
    "DDIMScheduler": Way("ddim", PLAIN, followed={**STEPPED, "thresholding": (False,)}),
    "DDPMScheduler": Way("ddpm", PLAIN),
    "EulerDiscreteScheduler": Way("euler", EULER),
    "EulerAncestralDiscreteScheduler": Way("euler_ancestral", EULER, note=OWN_NOISE),
    "HeunDiscreteScheduler": Way("heun", EULER, followed={"clip_sample": (False,)}),
    "DPMSolverMultistepScheduler": Way("dpmpp_2m", DPM),
    "DPMSolverSDEScheduler": Way("dpmpp_sde", EULER, note=OWN_NOISE),
    "DEISMultistepScheduler": Way("deis_2", DPM, followed={"solver_type": ("logrho",), "use_flow_sigmas": (False,)}),
    "UniPCMultistepScheduler": Way("unipc_2", DPM, followed=UNIPC),
    "LCMScheduler": Way("lcm", dict.fromkeys(PLAIN, "lcm")),
    "PNDMScheduler": Way("ipndm", PLAIN, note="its Runge-Kutta warm-up is replaced by plain steps", followed=STEPPED),
    "DPMSolverSinglestepScheduler": Way("dpmpp_2m", DPM, note=STAND_IN),
    "LMSDiscreteScheduler": Way("dpmpp_2m", EULER, note=STAND_IN),
    "KDPM2DiscreteScheduler": Way("dpmpp_2m", EULER, note=STAND_IN),
    "KDPM2AncestralDiscreteScheduler": Way("dpmpp_2m", EULER, note=STAND_IN),
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
    "FlowMatchEulerDiscreteScheduler": Way("euler", {}, followed=NO_SIGMAS),
    "FlowMatchHeunDiscreteScheduler": Way("heun_flow", {}),
}
UNKNOWN = Way("ddim", PLAIN, note="it is not known, and deterministic DDIM stands in for it")

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
    """The facts in a scheduler_config.json; raises BadInput naming `where` for settings that make no sense.

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
        raise BadInput(f"{where}: prediction_type '{kind}' is not one of {', '.join(PREDICTIONS)}")
    try:
        if not text_or_latent:
            return _pixel_facts(config, flow, kind)
        return _flow_facts(config, name, pipeline_sigmas) if flow else _facts(config, name, kind)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    except Exception as error:  # torch's and diffusers' own types for settings that make no sense
        raise BadInput(f"{where}: no noise schedule can be made from it ({first_line(error)})") from error


def _pixel_facts(config: dict[str, Any], flow: bool, kind: str) -> SchedulerFacts:
    if flow:
        schedule = flow_schedule(int(config.get("num_train_timesteps", 1000)) + 1)
    else:
        schedule = _table(diffusers.DDPMScheduler.from_config(config))
    clip = bool(config.get("clip_sample", True))
    return SchedulerFacts("flow" if flow else PREDICTIONS[kind], schedule, Spacing(), "ddim", clip)


def _facts(config: dict[str, Any], name: str, kind: str) -> SchedulerFacts:
    scheduler, settings = _built(name if name in WAYS else "DDPMScheduler", config)
    way, settings = _way(name, kind, settings)
    start = Plan.start
    if _has_flow_sigmas(config, name):
        schedule = flow_schedule(int(config.get("num_train_timesteps", 1000)) + 1)
        grid = "unipc_flow" if name == "UniPCMultistepScheduler" else "dpm_flow"
        spacing, start = Spacing(grid, whole=False, shift=float(settings["flow_shift"])), "unit"
    else:
        schedule, spacing = _table(scheduler), _spacing(settings, way)
        if way.grids is EULER and settings.get("timestep_spacing") != "leading":
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
        solver=way.solver,
        clip=bool(settings.get("clip_sample", False)) and threshold is None,
        end=0.0 if noisy and way.solver != "lcm" else None,
        start=start,
        threshold=threshold,
        note=_note(name, way, settings),
    )


def _way(name: str, kind: str, settings: dict[str, Any]) -> tuple[Way, dict[str, Any]]:
    """How that class walks with these settings, and the settings without those that this has taken care of."""
    way = WAYS.get(name, UNKNOWN)
    orders = ORDERS.get((name, settings.get("algorithm_type")))
    if orders is not None:
        order = int(settings["solver_order"])
        if 1 <= order <= len(orders):
            way = way._replace(solver=orders[order - 1])
        else:
            way = way._replace(followed={**way.followed, "solver_order": tuple(range(1, len(orders) + 1))})
        if settings.get("algorithm_type") == "sde-dpmsolver++":
            way = way._replace(solver=orders[min(order, len(orders)) - 1], note=OWN_NOISE)
    if name == "DDIMScheduler" and settings["clip_sample"]:  # it keeps eps when it clips x_0
        return way._replace(solver=CLIPPING), settings | {"clip_sample": False}
    if name == "DDPMScheduler" and settings["variance_type"] == "fixed_large":
        # on other grids theirs adds noise to the clean sample that it ends at
        exact = settings["timestep_spacing"] == "leading" and settings["steps_offset"] == 0
        return way._replace(solver="ddpm_large"), settings | ({"variance_type": None} if exact else {})
    if settings.get("skip_prk_steps"):  # PNDM without its Runge-Kutta steps, which mixes what the network returns
        return way._replace(solver="plms_v" if kind == "v_prediction" else "plms", note=None), settings
    return way, settings


def _flow_facts(config: dict[str, Any], name: str, pipeline_sigmas: bool | None) -> SchedulerFacts:
    way = FLOWS.get(name, FLOWS["FlowMatchEulerDiscreteScheduler"]._replace(note=STAND_IN))
    _, settings = _built(name if name in FLOWS else "FlowMatchEulerDiscreteScheduler", config)
    shift = float(settings["shift"])
    dynamic = None
    if settings.get("use_dynamic_shifting"):
        low, high = float(settings["base_shift"]), float(settings["max_shift"])
        dynamic = low, high, float(settings["base_image_seq_len"]), float(settings["max_image_seq_len"])
    own = (dynamic is not None or shift == 1.0) if pipeline_sigmas is None else pipeline_sigmas
    own &= way.solver == "euler"  # no pipeline lays them out for Heun
    return SchedulerFacts(
        prediction="flow",
        # diffusers counts a flow's time in T-ths up to T itself: T + 1 timesteps
        schedule=flow_schedule(int(settings["num_train_timesteps"]) + 1),
        spacing=Spacing("flow_trailing" if own else "flow_linspace", whole=False, shift=shift, dynamic=dynamic),
        solver=way.solver,
        clip=False,
        note=_note(name, way, settings),
    )


def _built(name: str, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """diffusers' scheduler, and its own settings: files carry along those of the class they once were of."""
    cls = getattr(diffusers, name)
    if hasattr(cls, "_backends"):  # an empty shell, where a package it needs is not installed: one with its settings
        cls = diffusers.EulerDiscreteScheduler
    scheduler = cls.from_config(config)
    own = inspect.signature(cls.__init__).parameters
    return scheduler, {key: value for key, value in scheduler.config.items() if key in own}


def _has_flow_sigmas(config: dict[str, Any], name: str) -> bool:
    return bool(config.get("use_flow_sigmas")) and WAYS.get(name, UNKNOWN).grids is DPM


def _table(scheduler: Any) -> NoiseSchedule:
    """Any scheduler of the beta family is one table; diffusers itself makes it from the config."""
    abar = scheduler.alphas_cumprod.double().numpy()
    with np.errstate(invalid="ignore"):  # NoiseSchedule refuses what is no number then
        return NoiseSchedule(tuple(np.sqrt(abar).tolist()), tuple(np.sqrt(1.0 - abar).tolist()))


def _spacing(settings: dict[str, Any], way: Way) -> Spacing:
    kind = str(settings.get("timestep_spacing", "linspace"))
    if kind not in way.grids:
        raise BadInput(f"timestep_spacing '{kind}' is not one of {', '.join(way.grids)}")
    if settings.get("use_karras_sigmas"):
        return Spacing("karras", whole=False)
    if settings.get("use_exponential_sigmas") or settings.get("use_lu_lambdas"):
        return Spacing("exponential", whole=False)
    if settings.get("use_beta_sigmas"):
        return Spacing("beta", whole=False)
    grid = way.grids[kind]
    # diffusers adds the offset to leading grids alone
    offset = int(settings["steps_offset"]) if grid.endswith("leading") else 0
    return Spacing(grid, offset, whole=not (way.grids is EULER and grid == "linspace"))


def _note(name: str, way: Way, settings: dict[str, Any]) -> str | None:
    """One sentence on what differs from the scheduler, or None."""
    followed = {**FOLLOWED, **way.followed}
    if way.grids is EULER and settings.get("timestep_spacing") != "linspace":
        followed |= NO_SIGMAS  # there they run between the ends of that grid, not of the table
    odd = [f"{key} {settings[key]}" for key, values in followed.items() if settings.get(key, values[0]) not in values]
    told = [way.note] if way.note else []
    told += [] if way.note is STAND_IN else [f"not followed exactly: {', '.join(odd)}"] * bool(odd)
    return f"{name or 'no scheduler class'}: {'; '.join(told)}" if told else None
