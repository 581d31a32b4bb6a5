"""One noised batch, x_t = alpha_t x_0 + sigma_t eps, and what a network should say of it.

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
    """Alpha and sigma at integer timesteps `t` [B], shaped [B, 1, 1, 1]."""
    alphas, sigmas = _tables(spec.schedule, t.device)
    return alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)


@lru_cache(maxsize=8)
def _tables(schedule: NoiseSchedule, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [T] each; moved to the device once, which a step that is captured cannot do."""
    alphas, sigmas = (torch.tensor(table, dtype=torch.float32) for table in (schedule.alphas, schedule.sigmas))
    return alphas.to(device), sigmas.to(device)


def add_noise(spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = coefficients(spec, t)
    return alpha * x0 + sigma * noise


def target_of(spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What a perfect denoiser of this parameterisation returns for this noised batch."""
    alpha, sigma = coefficients(spec, t)
    targets = {"epsilon": noise, "sample": x0, "v": alpha * noise - sigma * x0, "flow": noise - x0}
    return targets[spec.prediction]


def to_epsilon(spec: DenoiserSpec, out: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The noise that an output of this parameterisation implies."""
    alpha, sigma = coefficients(spec, t)
    if spec.prediction == "epsilon":
        return out
    if spec.prediction == "v":
        return alpha * out + sigma * x_t
    if spec.prediction == "flow":
        return x_t + alpha * out
    return (x_t - alpha * out) / sigma.clamp_min(1e-4)


def forward(
    model: nn.Module, spec: DenoiserSpec, x_t: torch.Tensor, t: torch.Tensor, conditions: Tensors
) -> torch.Tensor:
    """The network's output for integer timesteps `t` [B], told in the type that sampling uses.

    Where guidance is an input, the weight is that of the plan unless `conditions` have one.
    """
    inputs = {SAMPLE: x_t, TIMESTEP: t.to(timestep_dtype(spec)), **conditions}
    if spec.conditioning.guidance_input and GUIDANCE not in inputs:
        inputs[GUIDANCE] = torch.full((len(x_t),), spec.plan.guidance, device=x_t.device)
    return adapter_for(model).forward(model, inputs)


def epsilon_loss(
    model: nn.Module, spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, conditions: Tensors
) -> torch.Tensor:
    """Mean squared error of the noise that the model's answer implies, whatever it predicts (DDPM's simple loss)."""
    x_t = add_noise(spec, x0, noise, t)
    return torch.mean((to_epsilon(spec, forward(model, spec, x_t, t, conditions), x_t, t) - noise) ** 2)
