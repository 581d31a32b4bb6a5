"""Targets of a noised batch x_t = alpha_t x_0 + sigma_t eps for each prediction type.

prediction   target                     as epsilon
epsilon      eps                        out
sample       x_0                        (x_t - alpha out) / sigma
v            alpha eps - sigma x_0      alpha out + sigma x_t
flow         eps - x_0                  x_t + alpha out
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from diffpress.compress.models.adapter import adapter_for, timestep_dtype
from diffpress.runtime.network_inputs import GUIDANCE, SAMPLE, TIMESTEP
from diffpress.runtime.noise_schedule import NoiseSchedule
from diffpress.runtime.spec import DenoiserSpec

Tensors = dict[str, torch.Tensor]


def coefficients(spec: DenoiserSpec, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return alpha and sigma at integer timesteps `t` [B], shaped [B, 1, 1, 1]."""
    alphas, sigmas = _tables(spec.schedule, t.device)
    return alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)


@lru_cache(maxsize=8)
def _tables(schedule: NoiseSchedule, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return alphas and sigmas, float32 [T]; cached, since graph capture cannot copy to the device."""
    alphas, sigmas = (torch.tensor(table, dtype=torch.float32) for table in (schedule.alphas, schedule.sigmas))
    return alphas.to(device), sigmas.to(device)


def add_noise(spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return x_t = alpha_t x_0 + sigma_t eps at integer timesteps `t` [B]."""
    alpha, sigma = coefficients(spec, t)
    return alpha * x0 + sigma * noise


def target_of(spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the training target of the spec's prediction type, [B, C, H, W]."""
    alpha, sigma = coefficients(spec, t)
    targets = {"epsilon": noise, "sample": x0, "v": alpha * noise - sigma * x0, "flow": noise - x0}
    return targets[spec.prediction]


def to_epsilon(spec: DenoiserSpec, out: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the noise implied by a network output at x_t."""
    alpha, sigma = coefficients(spec, t)
    if spec.prediction == "epsilon":
        return out
    if spec.prediction == "v":
        return alpha * out + sigma * x_t
    if spec.prediction == "flow":
        return x_t + alpha * out
    return (x_t - alpha * out) / sigma.clamp_min(1e-4)


def forward(model: nn.Module, spec: DenoiserSpec, x_t: torch.Tensor, t: torch.Tensor, cond: Tensors) -> torch.Tensor:
    """Evaluate the network at integer timesteps `t` [B], passed in the dtype that sampling uses.

    If the guidance weight is an input and `cond` does not contain it, the plan's weight is used.
    """
    inputs = {SAMPLE: x_t, TIMESTEP: t.to(timestep_dtype(spec)), **cond}
    if spec.conditioning.guidance_input and GUIDANCE not in inputs:
        inputs[GUIDANCE] = torch.full((len(x_t),), spec.plan.guidance, device=x_t.device)
    return adapter_for(model).forward(model, inputs)


def epsilon_loss(
    model: nn.Module, spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, cond: Tensors
) -> torch.Tensor:
    """Return the mean squared error of the noise implied by the output (simple loss of DDPM)."""
    x_t = add_noise(spec, x0, noise, t)
    return torch.mean((to_epsilon(spec, forward(model, spec, x_t, t, cond), x_t, t) - noise) ** 2)
