"""The scheduler with which OpenVINO GenAI samples a plan: one of its classes, whose config gives the same plan.

GenAI builds the scheduler from scheduler_config.json as diffusers does, and takes the number of steps and the guidance
weight at each call. So a config is a candidate if our own reader of diffusers' configs (compress/sources/
scheduler_config.py) turns it into the plan. Searched timesteps, output corrections and step caches are in no config.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffpress.compress.sources.scheduler_config import PREDICTIONS, scheduler_facts
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseSchedule, is_flow
from diffpress.runtime.requested_plan import EQUIVALENT_SOLVERS, plan_description
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec

Settings = dict[str, Any]

SPACINGS = ("leading", "trailing", "linspace")
# class -> spacings that GenAI computes as diffusers does; its PNDM and LCM have one each
DIFFUSION = {
    "DDIMScheduler": SPACINGS,
    "EulerDiscreteScheduler": SPACINGS,
    "PNDMScheduler": ("leading",),
    "LCMScheduler": ("leading",),
}
FLOW = "FlowMatchEulerDiscreteScheduler"
BETAS = ("linear", "scaled_linear")  # GenAI reads any other schedule as trained_betas


@dataclass(frozen=True)
class GenaiPlan:
    """A plan that GenAI follows.

    Attributes:
        config: The content of scheduler_config.json.
        plan: What GenAI samples with this config, and with the plan's number of steps and guidance.
        changes: Settings of the model's own plan that are not followed; empty if the plans are the same.
    """

    config: Settings
    plan: SamplingPlan
    changes: tuple[str, ...] = ()


def genai_plan(spec: DenoiserSpec, scheduler: Settings | None, nearest: bool) -> GenaiPlan:
    """Return the plan of `spec` as GenAI samples it.

    Args:
        spec: The model's spec.
        scheduler: The config of the checkpoint's scheduler.
        nearest: Whether to return the nearest plan that GenAI can follow, with as many steps, if it cannot follow this
            one; its `changes` then name the settings.

    Raises:
        InvalidInputError: GenAI cannot follow the plan, and `nearest` is False, or no plan is near.
    """
    plan = spec.plan
    changes = [f"{name} ({what})" for name, what in _unfollowed(plan).items()]
    plain = replace(
        plan.without_cache.without_corrections, guidance_interval=None, guidance_rescale=0.0, threshold=None, clip=False
    )
    found = list(_candidates(spec, plain, scheduler or {}))
    same = next((one for one in found if _samples_alike(one.plan, plain)), None)
    if same is None:
        changes.append(f"solver and timesteps ({plan_description(spec)})")
    if not changes and same is not None:
        return same
    if not nearest:
        raise InvalidInputError(
            f"target genai: OpenVINO GenAI cannot follow the plan's {', '.join(changes)}; sample the bundle with "
            "diffpress, or export the nearest plan that it can follow: --nearest-plan"
        )
    deterministic = [one for one in found if one.plan.solver in (*EQUIVALENT_SOLVERS, "plms", "plms_v")]
    if same is None and not deterministic:
        raise InvalidInputError("target genai: OpenVINO GenAI has no scheduler for this model's noise schedule")
    chosen = same or min(deterministic, key=lambda one: _distance(one.plan, plain, spec.schedule))
    return replace(chosen, changes=tuple(changes))


def _unfollowed(plan: SamplingPlan) -> dict[str, str]:
    """Return name -> value of the settings in use that no scheduler of GenAI has."""
    settings = {
        "output_corrections": f"{len(plan.output_corrections)} timesteps" if plan.output_corrections else "",
        "cache": f"step cache of kind {plan.cache.kind}" if plan.cache is not None else "",
        "guidance_interval": str(plan.guidance_interval or ""),
        "guidance_rescale": f"{plan.guidance_rescale:g}" if plan.guidance_rescale else "",
        "threshold": "dynamic thresholding" if plan.threshold is not None else "",
        "eta": f"{plan.eta:g}" if plan.eta else "",
        "clip": "x_0 is clipped" if plan.clip else "",
    }
    return {name: value for name, value in settings.items() if value}


def _candidates(spec: DenoiserSpec, plan: SamplingPlan, scheduler: Settings) -> Iterator[GenaiPlan]:
    """Yield the plans of all configs that GenAI reads, with the steps and guidance of `plan`."""
    for config in _flow_configs(scheduler) if is_flow(spec.schedule) else _diffusion_configs(spec, scheduler):
        try:
            facts = scheduler_facts(config, str(config["_class_name"]))
            plain = replace(
                SamplingPlan(facts.solver, (0.0,), clip=facts.clip, end=facts.end, start=facts.start),
                guidance=plan.guidance,
            )
            spaced = plain.spaced(facts.spacing, plan.steps, spec.schedule, spec.tokens(spec.sample_shape))
        except InvalidInputError:  # an impossible combination of class, spacing and steps
            continue
        yield GenaiPlan(config, spaced)


def _diffusion_configs(spec: DenoiserSpec, scheduler: Settings) -> Iterator[Settings]:
    base = _betas(spec.schedule, scheduler) | {
        "num_train_timesteps": len(spec.schedule),
        "prediction_type": next(name for name, kind in PREDICTIONS.items() if kind == spec.prediction),
        "clip_sample": False,
    }
    for name, spacings in DIFFUSION.items():
        own = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
        for spacing, offset, to_one in itertools.product(spacings, (0, 1), (False, True)):
            ends = {} if name == "EulerDiscreteScheduler" else {"set_alpha_to_one": to_one}
            if ends or to_one:
                spaced = {"timestep_spacing": spacing, "steps_offset": offset}
                yield {"_class_name": name, **base, **own, **spaced, **ends}


def _betas(schedule: NoiseSchedule, scheduler: Settings) -> Settings:
    """Return the entries of the noise schedule: the checkpoint's own if GenAI computes the same, or else all betas."""
    known = scheduler.get("beta_schedule") in BETAS and scheduler.get("trained_betas") is None
    if known and not scheduler.get("rescale_betas_zero_snr"):
        return {key: scheduler[key] for key in ("beta_schedule", "beta_start", "beta_end") if key in scheduler}
    cumulative = np.square(np.asarray(schedule.alphas, dtype=np.float64))
    previous = np.concatenate([[1.0], cumulative[:-1]])
    return {"beta_schedule": "linear", "trained_betas": [float(beta) for beta in 1.0 - cumulative / previous]}


def _flow_configs(scheduler: Settings) -> Iterator[Settings]:
    """Yield the checkpoint's own config for GenAI's class of flows."""
    if scheduler.get("_class_name") == FLOW:
        yield scheduler


def _samples_alike(one: SamplingPlan, other: SamplingPlan) -> bool:
    """Whether two plans give the same images: DDIM without fresh noise is Euler's method."""
    same_solver = one.solver == other.solver or {one.solver, other.solver} <= EQUIVALENT_SOLVERS
    close = len(one.ratios) == len(other.ratios) and np.allclose(one.ratios, other.ratios, rtol=1e-4)
    settings = ("timesteps", "end", "start", "stride", "guidance")
    return same_solver and close and all(getattr(one, name) == getattr(other, name) for name in settings)


def _distance(one: SamplingPlan, other: SamplingPlan, schedule: NoiseSchedule) -> float:
    """Return how far apart the timesteps of two plans with as many steps are, as a share of all timesteps."""
    difference = np.abs(np.asarray(one.timesteps) - np.asarray(other.timesteps))
    return float(difference.mean()) / len(schedule) + (one.solver != other.solver) * 1e-6
