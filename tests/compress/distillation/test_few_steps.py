"""compress/distillation/few_steps.py: timesteps and plans of students, and their noise levels in torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.distillation.few_steps import (
    clip_x0,
    disjoint_timesteps,
    few_timesteps,
    gather_levels,
    refine_plan,
)
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule, flow_schedule, noise_level_at
from diffpress.runtime.parameterization import implied_x0, to_x0, transfer
from diffpress.runtime.sampler import sample
from diffpress.runtime.sampling_plan import make_plan, plan_levels


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 500])
def test_timesteps_descend_and_the_last_step_is_long(kind: str, steps: int) -> None:
    schedule = betas_schedule(kind)
    found = few_timesteps(steps, schedule)
    assert len(found) == steps and list(found) == sorted(set(found), reverse=True)
    assert (found[0] > 0.9 * len(schedule) and found[-1] > 150 / steps) or steps == 500


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2"])
def test_the_second_of_two_steps_starts_at_a_medium_noise_level(kind: str) -> None:
    schedule = betas_schedule(kind)
    _, second = (level.sigma / level.alpha for level in plan_levels(schedule, few_timesteps(2, schedule))[:-1])
    assert 0.8 < second < 4.0


def test_halving_keeps_every_second_timestep() -> None:
    schedule = betas_schedule("squaredcos_cap_v2")
    np.testing.assert_allclose(few_timesteps(8, schedule)[::2], few_timesteps(4, schedule), atol=1.0)


def test_plans_of_one_student_share_no_timestep() -> None:
    schedule = betas_schedule("squaredcos_cap_v2")
    plans = disjoint_timesteps((4, 2, 1), schedule)
    assert plans[0] == few_timesteps(4, schedule) and [len(plan) for plan in plans] == [4, 2, 1]
    all_timesteps = [t for plan in plans for t in plan]
    assert len(set(all_timesteps)) == len(all_timesteps)
    gaps = -np.diff(sorted(all_timesteps, reverse=True))
    assert gaps.min() >= 8
    for plan in plans[1:]:
        # the shifted timesteps stay near their unshifted positions
        np.testing.assert_allclose(plan, few_timesteps(len(plan), schedule), atol=16)


def test_plans_that_must_share_timesteps_are_refused() -> None:
    with pytest.raises(
        InvalidInputError, match="19 steps cannot avoid the timesteps of 20 steps in a schedule of 20 timesteps"
    ):
        disjoint_timesteps((20, 19), betas_schedule("linear", 20))


@pytest.mark.parametrize(("steps", "fine"), [(1, 8), (2, 8), (3, 10), (4, 4)])
def test_a_fine_plan_contains_every_timestep_of_the_student(steps: int, fine: int) -> None:
    schedule = betas_schedule("squaredcos_cap_v2")
    timesteps = few_timesteps(steps, schedule)
    plan, kept = refine_plan(make_plan("dpmpp_2m", 5, schedule), timesteps, fine, schedule)
    assert tuple(plan.timesteps[i] for i in kept) == timesteps and plan.solver == "dpmpp_2m"
    assert fine <= plan.steps <= fine + steps and list(plan.timesteps) == sorted(set(plan.timesteps), reverse=True)
    ratios = [level.sigma / level.alpha for level in plan_levels(schedule, plan.timesteps)[:-1]]
    inner = np.diff(np.log(ratios[kept[-1] :]))
    if len(inner) > 2:
        assert inner.min() > 2.0 * inner.max()  # both are negative: even in log-SNR up to rounding to integers


@pytest.mark.parametrize("schedule", [betas_schedule("squaredcos_cap_v2"), flow_schedule(1000)], ids=["cosine", "flow"])
@pytest.mark.parametrize("counts", [(2,), (4,), (4, 2, 1)])
def test_fine_steps_are_distributed_by_length_in_log_snr(schedule: NoiseSchedule, counts: tuple[int, ...]) -> None:
    stops = tuple(sorted({t for plan in disjoint_timesteps(counts, schedule) for t in plan}, reverse=True))
    plan, _ = refine_plan(make_plan("dpmpp_2m", 5, schedule), stops, 20, schedule)
    levels = [level for level in plan_levels(schedule, plan.timesteps)[:-1] if level.t > 10]
    steps = -np.diff([np.log(level.sigma / level.alpha) for level in levels])
    # 20 steps over a range of about 11 in log-SNR: no step is much longer than the average
    assert steps.max() < 0.8


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_a_step_between_gathered_levels_is_that_of_the_sampler(
    prediction: str, one_image: Callable[..., Checkpoint]
) -> None:
    spec = one_image(prediction).spec
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((2, 3, 1, 8, 8), dtype=np.float32)
    now, after = noise_level_at(spec.schedule, 70), noise_level_at(spec.schedule, 30)
    here, there = (gather_levels((now, after), torch.full((3,), i), 3) for i in range(2))
    x0 = to_x0(prediction, torch.from_numpy(x), torch.from_numpy(out), here)
    np.testing.assert_allclose(x0.numpy(), to_x0(prediction, x, out, now), rtol=1e-4, atol=1e-5)
    moved = transfer(torch.from_numpy(x), x0, here, there)
    plan = make_plan("euler", 2, spec.schedule)
    scale = np.hypot(now.alpha, now.sigma)
    expected = next(iter(sample(lambda *_: x0.numpy(), x / scale, spec.schedule, plan.over((70.0, 30.0))))).x
    np.testing.assert_allclose(moved.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(implied_x0(torch.from_numpy(x), moved, here, there).numpy(), x0.numpy(), atol=1e-3)


def test_clipping_bounds_x0_and_passes_the_gradient(one_image: Callable[..., Checkpoint]) -> None:
    spec = one_image().spec
    x0 = torch.tensor([[-3.0, 0.5, 2.0]], requires_grad=True)
    assert clip_x0(spec, x0) is x0  # this plan does not clip
    bounded = clip_x0(spec.with_plan(make_plan("ddim", 4, spec.schedule, clip=True)), x0)
    assert bounded.tolist() == [[-1.0, 0.5, 1.0]]
    bounded.sum().backward()
    assert x0.grad is not None and x0.grad.tolist() == [[1.0, 1.0, 1.0]]
