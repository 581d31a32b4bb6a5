"""compress/distillation/consistency.py: the noise level pairs, the loss and the boundary condition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.distillation.config import ConsistencyConfig
from diffpress.compress.distillation.consistency import HUBER, consistency_x0, draw_timestep_pairs, pseudo_huber
from diffpress.runtime.noise_schedule import betas_schedule


def draw_levels(share: float, **settings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    config = ConsistencyConfig(kind="consistency", batch=4000, **settings)
    schedule = betas_schedule("squaredcos_cap_v2")
    t, s = draw_timestep_pairs(schedule, config, share, torch.Generator().manual_seed(0))
    ratios = np.asarray(schedule.sigmas) / np.asarray(schedule.alphas)
    return t.numpy(), s.numpy(), ratios


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_the_lower_level_follows_the_mapping_of_the_paper(share: float) -> None:
    t, s, ratios = draw_levels(share, q=2.0, stages=6)
    assert (s < t).all() and s.min() == -1
    stage = 1 + int(share * 6)
    r = ratios[t]
    expected = r * np.maximum(0.0, 1.0 - (1.0 + 8.0 / (1.0 + np.exp(np.minimum(r, 50)))) / 2.0**stage)
    far = (s >= 0) & (t - s > 3)  # where integer timesteps are fine enough
    step = np.abs(np.diff(ratios, prepend=ratios[0]))[s[far]] + np.abs(np.diff(ratios, append=ratios[-1]))[s[far]]
    assert far.any() and (np.abs(ratios[s[far]] - expected[far]) <= step).all()


def test_the_target_is_first_the_clean_image_and_later_a_neighboring_level() -> None:
    shares = [(draw_levels(share)[1] < 0).mean() for share in (0.0, 0.5, 0.99)]
    assert shares[0] > 0.5 > 0.05 > shares[1] >= shares[2]


def test_noise_levels_are_log_normal() -> None:
    t, _, ratios = draw_levels(0.0, level_mean=-0.4, level_sd=1.0)
    logs = np.log(ratios[t])
    assert logs.mean() == pytest.approx(-0.4, abs=0.05) and logs.std() == pytest.approx(1.0, abs=0.05)


def test_pseudo_huber_is_the_distance_at_large_values_and_smooth_at_zero() -> None:
    d = torch.zeros(2, 1, 8, 8, requires_grad=True)
    loss = pseudo_huber(d)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and d.grad is not None and d.grad.abs().sum() == 0.0
    far = torch.full((1, 1, 8, 8), 2.0)
    assert pseudo_huber(far).item() == pytest.approx(16.0 - HUBER * 8, rel=1e-3)
    near, c = pseudo_huber(far / 1000).item(), HUBER * 8
    assert math.isclose(near, math.sqrt(0.016**2 + c**2) - c, rel_tol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_without_noise_the_function_returns_the_image_for_any_network_output(
    prediction: str, unet_with: Callable[..., Checkpoint], one_image: Callable[..., Checkpoint]
) -> None:
    checkpoint = unet_with(prediction="v")
    schedule = one_image("flow").spec.schedule  # its first timestep has no noise
    spec = one_image(prediction).spec.__class__(prediction, schedule, (1, 8, 8), one_image(prediction).spec.plan)
    x0, noise = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = consistency_x0(checkpoint.model, spec, x0, noise, torch.zeros(3, dtype=torch.long), {})
    torch.testing.assert_close(found, x0)
