"""Noised batches x_t = alpha_t x_0 + sigma_t eps, and a network's evaluation, loss and weights on them.

Each sample has its own timestep. Targets and x_0 follow from runtime/parameterization.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from diffpress.compress.models.adapter import adapter_for, timestep_dtype
from diffpress.runtime.conditioning import MASKED_IMAGE
from diffpress.runtime.network_inputs import GUIDANCE, SAMPLE, TIMESTEP, whole_mask
from diffpress.runtime.noise_schedule import NoiseSchedule
from diffpress.runtime.parameterization import to_epsilon
from diffpress.runtime.spec import DenoiserSpec

Tensors = dict[str, torch.Tensor]


class NoiseLevelBatch(NamedTuple):
    """Noise level of each sample of a batch: timesteps int64 [B]; alpha and sigma float32, see `per_sample`."""

    t: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor


def noise_levels_at(spec: DenoiserSpec, t: torch.Tensor) -> NoiseLevelBatch:
    """Return the noise levels at integer timesteps `t` [B]."""
    alphas, sigmas = _tables(spec.schedule, t.device)
    rank = len(spec.sample_shape)
    return NoiseLevelBatch(t, per_sample(alphas[t], rank), per_sample(sigmas[t], rank))


def per_sample(values: torch.Tensor, rank: int) -> torch.Tensor:
    """Return one value per sample, [B], as [B, 1, ...] with `rank` ones: it broadcasts to samples of that rank."""
    return values.view(-1, *[1] * rank)


@lru_cache(maxsize=8)
def _tables(schedule: NoiseSchedule, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return alphas and sigmas, float32 [T]; cached, since graph capture cannot copy to the device."""
    alphas, sigmas = (torch.tensor(table, dtype=torch.float32) for table in (schedule.alphas, schedule.sigmas))
    return alphas.to(device), sigmas.to(device)


def add_noise(spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return x_t = alpha_t x_0 + sigma_t eps at integer timesteps `t` [B]."""
    level = noise_levels_at(spec, t)
    return level.alpha * x0 + level.sigma * noise


def forward(model: nn.Module, spec: DenoiserSpec, x_t: torch.Tensor, t: torch.Tensor, cond: Tensors) -> torch.Tensor:
    """Evaluate the network at integer timesteps `t` [B]."""
    return adapter_for(model).forward(model, inputs_at(spec, x_t, t, cond))


def inputs_at(spec: DenoiserSpec, x_t: torch.Tensor, t: torch.Tensor, cond: Tensors) -> Tensors:
    """Return the network's inputs at integer timesteps `t` [B], which are passed in the dtype that sampling uses.

    If the guidance weight is an input and `cond` does not contain it, the plan's weight is used. A network for
    inpainting repaints everything if `cond` has no masked image.
    """
    inputs = {SAMPLE: x_t, TIMESTEP: t.to(timestep_dtype(spec)), **cond}
    if spec.conditioning.guidance_input and GUIDANCE not in inputs:
        inputs[GUIDANCE] = torch.full((len(x_t),), spec.plan.guidance, device=x_t.device)
    if spec.conditioning.inpainting and MASKED_IMAGE not in inputs:
        inputs[MASKED_IMAGE] = torch.from_numpy(whole_mask(spec, len(x_t))).to(x_t.device)
    return inputs


def epsilon_loss(
    model: nn.Module, spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, cond: Tensors
) -> torch.Tensor:
    """Return the mean squared error of the noise implied by the output (simple loss of DDPM)."""
    x_t = add_noise(spec, x0, noise, t)
    eps = to_epsilon(spec.prediction, x_t, forward(model, spec, x_t, t, cond), noise_levels_at(spec, t))
    return torch.mean((eps - noise) ** 2)


def min_snr_weights(spec: DenoiserSpec, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the factors of a squared error of outputs at timesteps `t` [B] that make it min(SNR, gamma) |x_0 error|^2.

    Min-SNR weighting (Hang et al. 2023, arXiv:2303.09556). With SNR = alpha^2 / sigma^2 an error of the output changes
    x_0 by (parameterization.py)

        prediction   d x_0 / d out              factor
        sample       1                          min(SNR, gamma)
        epsilon      -sigma / alpha             min(SNR, gamma) / SNR
        v            -sigma                     min(SNR, gamma) / (SNR + 1)
        flow         -sigma / (alpha + sigma)   min(SNR, gamma) / (sqrt(SNR) + 1)^2

    The factors are finite at SNR = 0, where that of epsilon is 1 and those of the others are 0, and without noise.

    Returns:
        Factors [B, 1, ...].
    """
    _, alpha, sigma = noise_levels_at(spec, t)
    if spec.prediction == "sample":
        return ((alpha / sigma) ** 2).clamp_max(gamma)
    if spec.prediction == "epsilon":
        return (gamma * (sigma / alpha) ** 2).clamp_max(1.0)
    # x_0 = (alpha x - sigma out) / (alpha^2 + sigma^2) of v, and (x - sigma out) / (alpha + sigma) of flow
    norm = alpha**2 + sigma**2 if spec.prediction == "v" else alpha + sigma
    return torch.minimum(alpha**2, gamma * sigma**2) / norm**2
