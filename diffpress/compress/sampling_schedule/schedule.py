"""The `schedule` stage: choose the model's solver and timesteps; the weights do not change."""

from __future__ import annotations

import logging
from dataclasses import replace

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.compress.sampling_schedule.search import search
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
        raise InvalidInputError(
            f"schedule: this network was distilled ({spec.distilled}) for {old.steps} steps of {old.solver} and cannot "
            "use another plan; remove the stage"
        )
    plan, spacing = _with_options(spec, config), spec.spacing
    if config.spacing is not None:
        spacing = with_kind(spacing, config.spacing)
    if config.timesteps is not None:
        plan = plan.over(config.timesteps)
    else:
        spaced = settings_of(spec, config.solver).spacing if config.spacing is None else spacing
        plan = plan.spaced(spaced, config.steps, spec.schedule, spec.tokens(spec.sample_shape))
    result = checkpoint.evolve(spec=replace(spec, plan=plan, spacing=spacing))
    how = "explicit" if config.timesteps else spacing.kind
    if config.search is not None:
        network = TorchNetwork(checkpoint.model, spec)
        found, ctx.notes["search"] = search(network, result.spec, config, ctx.conditions(config.samples))
        result, how = result.evolve(spec=result.spec.with_plan(plan.over(found))), f"searched from {spacing.kind}"
    plan = result.spec.plan
    logger.info(f"plan {old.solver} {old.steps} steps -> {plan.solver} {plan.steps} steps ({how})")
    return result


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
