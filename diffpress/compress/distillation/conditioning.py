"""Conditioning in training: random dropping for students, classifier-free guidance for teachers."""

from __future__ import annotations

import torch
from torch import nn

from diffpress.compress.training.losses import Tensors, forward, per_sample
from diffpress.runtime.network_inputs import GUIDANCE
from diffpress.runtime.spec import DenoiserSpec


def drop_conditioning(
    inputs: dict[str, torch.Tensor],
    uncond_inputs: dict[str, torch.Tensor],
    generator: torch.Generator,
    share: float = 0.1,
) -> dict[str, torch.Tensor]:
    """Replace the conditioning of random samples by the unconditional one (Ho & Salimans 2022).

    This keeps classifier-free guidance usable after training. Inputs without an unconditional counterpart are kept.

    Args:
        inputs: Conditioning [B, ...] by name.
        uncond_inputs: Unconditional counterparts [1, ...] by name; if empty, `inputs` is returned unchanged.
        generator: Source of randomness.
        share: Probability of dropping a sample's conditioning.
    """
    if not uncond_inputs:
        return inputs
    batch = len(next(iter(inputs.values())))
    dropped = torch.rand((batch,), generator=generator) < share
    kept = {name: value for name, value in inputs.items() if name not in uncond_inputs}
    return kept | {
        name: torch.where(per_sample(dropped, inputs[name].dim() - 1), uncond_value, inputs[name])
        for name, uncond_value in uncond_inputs.items()
    }


def effective_guidance(spec: DenoiserSpec) -> float:
    """Return the guidance weight of the samples: that of the plan, or else the one baked into the network."""
    weight = spec.plan.guidance
    is_off = weight == 1.0 if spec.conditioning.guidance_input else weight <= 1.0
    return spec.baked_in_guidance if is_off else weight


def guided_output(
    teacher: nn.Module,
    spec: DenoiserSpec,
    x_t: torch.Tensor,
    t: torch.Tensor,
    cond: Tensors,
    uncond: Tensors,
    weight: torch.Tensor | float,
) -> torch.Tensor:
    """Return the teacher's output [B, ...] under classifier-free guidance, without gradients.

    Takes one evaluation if `weight` is a number of at most 1, as in sampling, or an input of the network, otherwise
    one evaluation of a batch of 2 B.

    Args:
        teacher: The network.
        spec: Its spec.
        x_t: Noisy samples [B, ...].
        t: Integer timesteps [B].
        cond: Conditional inputs [B, ...] by name.
        uncond: Unconditional inputs [1, ...] by name.
        weight: Guidance weight, one number or a tensor [B].
    """
    if spec.conditioning.guidance_input:
        weights = torch.full((len(x_t),), weight, device=x_t.device) if isinstance(weight, float) else weight
        cond, weight = cond | {GUIDANCE: weights}, 1.0
    if isinstance(weight, float) and weight <= 1.0:
        with torch.no_grad():
            return forward(teacher, spec, x_t, t, cond)
    uncond_value = {name: uncond[name].expand_as(value) if name in uncond else value for name, value in cond.items()}
    both = {name: torch.cat([value, uncond_value[name]]) for name, value in cond.items()}
    with torch.no_grad():
        cond_out, uncond_out = forward(teacher, spec, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    factor = weight if isinstance(weight, float) else per_sample(weight, x_t.dim() - 1)
    return uncond_out + factor * (cond_out - uncond_out)
