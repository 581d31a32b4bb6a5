"""What networks are told in training: students now and then nothing, and guided teachers both halves."""

from __future__ import annotations

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.training.losses import Tensors, forward
from diffpress.runtime.network_inputs import GUIDANCE
from diffpress.runtime.spec import DenoiserSpec


def drop_conditions(
    conditions: dict[str, torch.Tensor],
    null: dict[str, torch.Tensor],
    generator: torch.Generator,
    share: float = 0.1,
) -> dict[str, torch.Tensor]:
    """Tell a tenth of the batch nothing, `null` [1, ...], so that guidance keeps working (Ho & Salimans 2022)."""
    if not null:
        return conditions
    batch = len(next(iter(conditions.values())))
    dropped = torch.rand((batch,), generator=generator) < share
    kept = {name: value for name, value in conditions.items() if name not in null}
    return kept | {
        name: torch.where(dropped.view(-1, *[1] * (conditions[name].dim() - 1)), nothing, conditions[name])
        for name, nothing in null.items()
    }


def guidance_in(checkpoint: Checkpoint) -> float:
    """The weight of the guidance in its answers: its plan's, or what an earlier stage has put into its weights."""
    taught = [record.changed["guidance"] for record in checkpoint.history if "guidance" in record.changed]
    own = checkpoint.spec.plan.guidance
    return float(taught[-1]) if taught and own == 1.0 else own


def guided(
    teacher: nn.Module,
    spec: DenoiserSpec,
    x_t: torch.Tensor,
    t: torch.Tensor,
    cond: Tensors,
    uncond: Tensors,
    weight: torch.Tensor | float,
) -> torch.Tensor:
    """The teacher's answer under guidance `weight`, one or [B], without gradients; `uncond` [1, ...] is the
    unconditional half.

    One call where the one weight is 1 or the weight is an input.
    """
    if spec.conditioning.guidance_input:
        weights = torch.full((len(x_t),), weight, device=x_t.device) if isinstance(weight, float) else weight
        cond, weight = cond | {GUIDANCE: weights}, 1.0
    if isinstance(weight, float) and weight == 1.0:
        with torch.no_grad():
            return forward(teacher, spec, x_t, t, cond)
    nothing = {name: uncond[name].expand_as(value) if name in uncond else value for name, value in cond.items()}
    both = {name: torch.cat([value, nothing[name]]) for name, value in cond.items()}
    with torch.no_grad():
        cond_out, uncond_out = forward(teacher, spec, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return uncond_out + (weight if isinstance(weight, float) else weight.view(-1, 1, 1, 1)) * (cond_out - uncond_out)
