"""compress/training/losses.py: min-SNR weights against errors of x_0."""

from __future__ import annotations

import pytest
import torch

from diffpress.compress.training.losses import min_snr_weights, noise_levels_at
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule, flow_schedule
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

GAMMA = 5.0
ZERO_TERMINAL = NoiseSchedule((1.0, 0.8, 0.6, 0.0), (0.0, 0.6, 0.8, 1.0))


def spec_of(prediction: str, schedule: NoiseSchedule | None = None) -> DenoiserSpec:
    if schedule is None:
        schedule = flow_schedule(100) if prediction == "flow" else betas_schedule("linear", 100, 1e-3, 0.1)
    return DenoiserSpec(prediction, schedule, (1, 2, 2), make_plan("euler", 2, schedule))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_weighted_errors_of_the_output_are_bounded_snr_times_errors_of_the_image(prediction: str) -> None:
    spec, generator = spec_of(prediction), torch.Generator().manual_seed(0)
    t = torch.arange(1, 99)  # the ends of a flow are tested below
    level = noise_levels_at(spec, t)
    x, target, error = (torch.randn(len(t), 1, 2, 2, generator=generator) for _ in range(3))
    x0_error = to_x0(prediction, x, target + error, level) - to_x0(prediction, x, target, level)
    snr = (level.alpha / level.sigma) ** 2
    assert snr.min() < 1.0 < GAMMA < snr.max()
    weights = min_snr_weights(spec, t, GAMMA)
    assert weights.shape == (len(t), 1, 1, 1)
    torch.testing.assert_close(weights * error**2, snr.clamp(max=GAMMA) * x0_error**2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("prediction", "clean", "pure_noise"),
    [("epsilon", 0.0, 1.0), ("v", 0.0, 0.0), ("sample", GAMMA, 0.0), ("flow", 0.0, 0.0)],
)
def test_the_weights_are_limits_without_noise_and_at_pure_noise(
    prediction: str, clean: float, pure_noise: float
) -> None:
    schedule = flow_schedule(4) if prediction == "flow" else ZERO_TERMINAL
    weights = min_snr_weights(spec_of(prediction, schedule), torch.tensor([0, 3]), GAMMA)
    assert weights.flatten().tolist() == [clean, pure_noise]


def test_a_low_gamma_lowers_the_weight_of_low_noise_only() -> None:
    spec, t = spec_of("epsilon"), torch.arange(100)
    snr = (torch.tensor(spec.schedule.alphas) / torch.tensor(spec.schedule.sigmas)) ** 2
    weights = min_snr_weights(spec, t, 1.0).flatten()
    assert torch.equal(weights[snr <= 0.99], torch.ones(int((snr <= 0.99).sum())))
    torch.testing.assert_close(weights[snr > 1.0], 1.0 / snr[snr > 1.0].float(), rtol=1e-4, atol=0.0)
