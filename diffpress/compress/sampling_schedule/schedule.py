"""The `schedule` stage: choose the model's solver, timesteps and step cache; the weights do not change."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import cut_name
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.sampling_schedule.config import ScheduleConfig, StepCacheConfig
from diffpress.compress.sampling_schedule.search import search
from diffpress.compress.sampling_schedule.step_cache import choose_step_cache
from diffpress.runtime.caching.step_cache import FULL, StepCache
from diffpress.runtime.carried_settings import settings_of, with_solver
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampling_plan import SamplingPlan, Threshold
from diffpress.runtime.spaced_timesteps import with_kind
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)


def schedule(checkpoint: Checkpoint, config: ScheduleConfig, ctx: Context) -> Checkpoint:
    """Return the checkpoint with a new sampling plan.

    A timestep spacing keeps the timestep shift of a flow model.

    Raises:
        InvalidInputError: The network was distilled for specific sampling plans.
    """
    spec, old = checkpoint.spec, checkpoint.spec.plan
    if spec.distilled:
        few = ", and between its few steps too much changes for a step cache" if config.cache is not None else ""
        raise InvalidInputError(
            f"schedule: this network was distilled ({spec.distilled}) for {old.steps} steps of {old.solver} and cannot "
            f"use another plan{few}; remove the stage"
        )
    options = _with_options(spec, config)
    if config.spacing is not None:
        spec = replace(spec, spacing=with_kind(spec.spacing, config.spacing))
    network, kind = TorchNetwork(checkpoint.model, spec), spec.spacing.kind

    def over(steps: int) -> SamplingPlan:
        spacing = settings_of(spec, config.solver).spacing if config.spacing is None else spec.spacing
        return options.spaced(spacing, steps, spec.schedule, spec.tokens(spec.sample_shape))

    def searched(start: SamplingPlan, notes: dict[str, Any]) -> SamplingPlan:
        """Return the plan over the searched timesteps, of as many steps; `start` itself without a search."""
        if config.search is None:
            return start
        found, notes["search"] = search(network, spec.with_plan(start), config, ctx.conditions(config.samples))
        return start.over(found)

    how = "explicit" if config.timesteps else kind if config.search is None else f"searched from {kind}"
    plan = options.over(config.timesteps) if config.timesteps is not None else over(config.steps)
    plan = searched(plan, ctx.notes)
    if config.cache is not None:
        cut, cost = _cut_and_cost(checkpoint, plan, config.cache, ctx)
        cache, ctx.notes["cache"] = choose_step_cache(
            TorchNetwork(checkpoint.model, spec, cut=cut),
            spec.with_plan(plan),
            config.cache,
            ctx.conditions(config.cache.samples),
            lambda steps: searched(over(steps), {}),
            cut=cut,
            cached_cost=cost,
        )
        plan = replace(plan, cache=cache)
    cached = "" if plan.cache is None else f", {plan.cache.counts[FULL]} of them evaluated"
    logger.info(f"plan {old.solver} {old.steps} steps -> {plan.solver} {plan.steps} steps ({how}){cached}")
    return checkpoint.evolve(spec=spec.with_plan(plan))


def _cut_and_cost(
    checkpoint: Checkpoint, plan: SamplingPlan, config: StepCacheConfig, ctx: Context
) -> tuple[str, float]:
    """Return the cut of kind features and the time of a cached evaluation in full ones; ('', 1) for forecasts.

    Raises:
        InvalidInputError: The model's family has no such cut, or no engine is open to measure the time.
    """
    if config.kind == "forecast":
        return "", 1.0
    name = cut_name(checkpoint.model, config.cut or "")
    if ctx.open_engine_costs is None:
        raise InvalidInputError(
            f"schedule: cache: kind {config.kind} measures its time in an engine, and none is open here; use kind "
            "forecast"
        )
    steps = ("full",) * plan.steps
    split = replace(plan, cache=StepCache("features", steps, cut=name))
    with ctx.open_engine_costs(checkpoint.evolve(spec=checkpoint.spec.with_plan(split)), config.engine) as costs:
        return name, costs.cached_latency_ratio()


def _with_options(spec: DenoiserSpec, config: ScheduleConfig) -> SamplingPlan:
    """Return the spec's plan with the solver and options of the config, and the old timesteps."""
    plan = replace(with_solver(spec, config.solver).without_corrections.without_cache, eta=config.eta)
    if config.guidance is not None:
        plan = replace(plan, guidance=config.guidance)
    if config.guidance_interval is not None:
        plan = replace(plan, guidance_interval=config.guidance_interval)
    if config.guidance_rescale is not None:
        plan = replace(plan, guidance_rescale=config.guidance_rescale)
    if config.threshold is not None:
        plan = replace(plan, threshold=Threshold(config.threshold))
    return plan
