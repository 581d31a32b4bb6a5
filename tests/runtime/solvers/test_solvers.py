"""runtime/solvers against exact solutions of the probability flow: each solver has its stated order."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.denoiser import Denoise
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import CLEAN, NoiseLevel, NoiseSchedule, betas_schedule, flow_schedule
from diffpress.runtime.parameterization import transfer
from diffpress.runtime.sampler import network_evaluations, sample
from diffpress.runtime.sampling_plan import SamplingPlan, make_plan, plan_levels
from diffpress.runtime.solvers import SOLVERS, get_solver, solver_evaluations
from diffpress.runtime.solvers.adams import ADAMS_BASHFORTH
from diffpress.runtime.solvers.contract import MAX_HISTORY, PreviousStep, StepState
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import timesteps_for
from tests.runtime.conftest import Gaussian, Mixture

# which need four timesteps of the noise schedule; see tests/compress/sources/test_scheduler_config.py
ON_TIMESTEPS = {"pndm", "pndm_v"}
ODE_SOLVERS = sorted(name for name, solver in SOLVERS.items() if not solver.noisy and name not in ON_TIMESTEPS)
# whose last step is first-order and ends at x_0 itself; the others mix outputs to the end
ENDING_AT_X0 = sorted(set(SOLVERS) - {"plms", "plms_v", "lms"} - ON_TIMESTEPS)
# whose first step takes an extra evaluation
EXTRA_EVALUATION = {"kdpm2", "heun", "heun_flow", "plms", "plms_v", "dpmpp_sde"}
NOW, NEXT = NoiseLevel(500.0, 0.6, 0.8), NoiseLevel(250.0, 0.8, 0.6)
LINEAR = betas_schedule("linear", 1000)
Flow = Callable[[np.ndarray, NoiseLevel, NoiseLevel], np.ndarray]
NoiseLevels = Callable[[int], list[NoiseLevel]]


def no_denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
    raise AssertionError("this step must not evaluate the network again")


def make_step(
    x: np.ndarray, x0: np.ndarray, now: NoiseLevel, next: NoiseLevel, history: Sequence[PreviousStep] = (), **facts: Any
) -> StepState:
    """Return a step in the middle of many, without added noise unless `facts` override it."""
    middle = {"index": len(history), "steps": 1000, "denoise": no_denoise, "noise": lambda k: np.zeros_like(x)}
    return StepState(x, x0, now, next, tuple(history), **{**middle, "eta": 0.0, "schedule": LINEAR, **facts})


def integrate(
    name: str,
    denoise: Denoise,
    x: np.ndarray,
    levels: Sequence[NoiseLevel],
    schedule: NoiseSchedule = LINEAR,
    exact: Flow | None = None,
) -> np.ndarray:
    """Run the solver over the levels; an `exact` solution replaces its first steps, which are of lower order."""
    solver, start = SOLVERS[name], x
    history: list[PreviousStep] = []
    # compared with an exact solution, no step may be near the end, where orders are lower too
    facts = {"steps": len(levels) - 1 if exact is None else 10**6, "denoise": denoise, "schedule": schedule}
    for index, (now, after) in enumerate(itertools.pairwise(levels)):
        known = exact if index < MAX_HISTORY else None
        step = make_step(x, denoise(x, now), now, after, history[-MAX_HISTORY:], index=index, **facts)
        if solver.correct is not None and known is None:
            step = step._replace(x=solver.correct(step))
        x = solver.move(step) if known is None else known(start, levels[0], after)
        history.append(PreviousStep(now, step.x, step.x0))
    return x


def move(name: str, *args: Any, **facts: Any) -> np.ndarray:
    return SOLVERS[name].move(make_step(*args, **facts))


def on_circle(ratio: float) -> NoiseLevel:
    return NoiseLevel(0.0, 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))


def order(name: str, denoise: Denoise, exact: Flow, noise_levels: NoiseLevels, coarse: int) -> float:
    """Return log2 of the error ratio between step size h and h / 2."""
    x = np.linspace(-2.0, 2.0, 64)
    errors = []
    for steps in (coarse, 2 * coarse):
        levels = noise_levels(steps)
        found = integrate(name, denoise, x, levels, exact=exact)
        errors.append(np.abs(found - exact(x, levels[0], levels[-1])).max())
    return math.log2(errors[0] / errors[1])


def equal_in_log_ratio(steps: int) -> list[NoiseLevel]:
    return [on_circle(math.exp(r)) for r in np.linspace(3.0, -3.0, steps + 1)]


def equal_in_ratio(steps: int) -> list[NoiseLevel]:
    return [on_circle(r) for r in np.linspace(5.0, 0.2, steps + 1)]


@pytest.mark.parametrize(
    ("name", "noise_levels", "coarse", "expected"),
    [
        ("ddim", equal_in_log_ratio, 64, 1.0),
        ("euler", equal_in_ratio, 64, 1.0),
        ("dpmpp_2m", equal_in_log_ratio, 64, 2.0),
        # Adams-Bashforth has its full order with equal steps in r, otherwise second order
        ("ipndm", equal_in_ratio, 64, 4.0),
        ("ipndm", equal_in_log_ratio, 64, 2.0),
        ("plms", equal_in_ratio, 64, 4.0),
        ("plms", equal_in_log_ratio, 64, 2.0),
        ("plms_v", equal_in_log_ratio, 64, 1.0),  # as in diffusers
        ("heun", equal_in_ratio, 64, 2.0),
        ("heun", equal_in_log_ratio, 64, 2.0),
        ("dpmpp_3m", equal_in_log_ratio, 64, 2.0),  # as published
        ("dpmpp_2m_heun", equal_in_log_ratio, 64, 2.0),
        ("dpmpp_2s", equal_in_log_ratio, 64, 2.0),
        ("dpm_2m", equal_in_log_ratio, 64, 2.0),
        ("kdpm2", equal_in_log_ratio, 64, 2.0),
        ("lms", equal_in_ratio, 64, 4.0),
        ("deis_2", equal_in_log_ratio, 64, 2.0),
        ("deis_3", equal_in_ratio, 128, 3.0),
        ("unipc_1", equal_in_log_ratio, 64, 2.0),  # the corrector adds one order
        ("unipc_2", equal_in_log_ratio, 64, 3.0),
        ("unipc_3", equal_in_log_ratio, 128, 4.0),
        ("unipc_bh1_2", equal_in_log_ratio, 64, 3.0),
    ],
)
def test_error_falls_with_the_order_of_the_solver(
    gaussian: Gaussian, name: str, noise_levels: NoiseLevels, coarse: int, expected: float
) -> None:
    measured = order(name, gaussian.denoise, gaussian.flow, noise_levels, coarse)
    # at these step counts, high orders are mixed with the next error term
    assert expected - 0.1 < measured < expected + (1.2 if expected == 4.0 else 0.2)


@pytest.fixture(scope="module")
def curved(mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """The starts of 64 trajectories and their ends, computed with many steps."""
    x = np.linspace(-2.0, 2.0, 64)
    return x, integrate("dpmpp_3m", mixture.denoise, x, equal_in_log_ratio(4096))


@pytest.mark.parametrize("name", sorted(set(ODE_SOLVERS) - {"ddim_clip"}))
def test_solvers_agree_on_a_curved_flow_with_many_steps(
    mixture: Mixture, curved: tuple[np.ndarray, np.ndarray], name: str
) -> None:
    x, fine = curved
    found = integrate(name, mixture.denoise, x, equal_in_log_ratio(512))
    first_order = name in ("ddim", "euler", "plms_v")
    assert np.abs(found - fine).max() < (2e-2 if first_order else 2e-3)


@pytest.mark.parametrize(
    "name", sorted(name for name in SOLVERS if SOLVERS[name].noisy and name not in ("lcm", "consistency"))
)
def test_stochastic_solvers_preserve_the_standard_deviation_of_the_data(gaussian: Gaussian, name: str) -> None:
    """Data N(mean, deviation^2), noised and sampled again, must have the same mean and deviation."""
    rng, levels = np.random.default_rng(0), equal_in_log_ratio(300)
    start = levels[0].alpha * (0.3 + 0.5 * rng.standard_normal(20000)) + levels[0].sigma * rng.standard_normal(20000)
    solver, x = SOLVERS[name], start
    history: list[PreviousStep] = []
    for now, after in itertools.pairwise(levels):
        facts = {"denoise": gaussian.denoise, "noise": lambda k: rng.standard_normal(20000)}
        step = make_step(x, gaussian.denoise(x, now), now, after, history[-MAX_HISTORY:], **facts)
        history.append(PreviousStep(now, x, step.x0))
        x = solver.move(step)
    spread = math.hypot(levels[-1].alpha * 0.5, levels[-1].sigma)
    # five standard errors of the mean and the deviation of 20000 values, and the bias of 300 steps
    assert abs(x.mean() - levels[-1].alpha * 0.3) < 5 * spread / 20000**0.5 + 0.01
    assert abs(x.std() / spread - 1) < 5 / 40000**0.5 + (0.03 if name != "dpmpp_sde" else 0.005)


def test_heun_on_a_flow_is_second_order(gaussian: Gaussian) -> None:
    def noise_levels(steps: int) -> list[NoiseLevel]:
        return [NoiseLevel(1000.0 * s, 1.0 - s, s) for s in np.linspace(1.0, 0.1, steps + 1)]

    assert abs(order("heun_flow", gaussian.denoise, gaussian.flow, noise_levels, 64) - 2.0) < 0.1
    # with one evaluation per step the order is one
    assert abs(order("euler", gaussian.denoise, gaussian.flow, noise_levels, 64) - 1.0) < 0.1


@pytest.mark.parametrize("expected", [2.0])
def test_dpmpp_sde_is_second_order_without_its_noise(
    gaussian: Gaussian, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpress.runtime.solvers import dpm

    monkeypatch.setattr(dpm, "split_noise", lambda now, next, eta: (next, 0.0))
    monkeypatch.setattr(dpm, "noisy_transfer", lambda s, x0, eta: transfer(s.x, x0, s.now, s.next))
    monkeypatch.setattr(dpm, "noise_level_at_ratio", lambda schedule, ratio: on_circle(ratio))
    assert abs(order("dpmpp_sde", gaussian.denoise, gaussian.flow, equal_in_log_ratio, 64) - expected) < 0.1


def test_multistep_solvers_beat_ddim_at_few_steps(mixture: Mixture) -> None:
    schedule = betas_schedule("squaredcos_cap_v2", 1000)
    x = np.linspace(-2.0, 2.0, 64)
    fine = integrate("ddim", mixture.denoise, x, plan_levels(schedule, timesteps_for("trailing", 1000, schedule)))
    few = plan_levels(schedule, timesteps_for("trailing", 10, schedule))
    error = {name: np.sqrt(np.mean((integrate(name, mixture.denoise, x, few) - fine) ** 2)) for name in ODE_SOLVERS}
    for name in ("dpmpp_2m", "ipndm", "unipc_2", "deis_2"):
        assert error[name] < 0.7 * error["ddim"], name


@pytest.mark.parametrize("name", sorted(set(ODE_SOLVERS) - EXTRA_EVALUATION))
def test_the_first_step_of_every_solver_is_deterministic_ddim(name: str, noise: Callable[..., np.ndarray]) -> None:
    x, x0 = noise(4), noise(4) * 0.5
    eps = (x - 0.6 * x0) / 0.8
    assert np.abs(move(name, x, x0, NOW, NEXT) - (0.8 * x0 + 0.6 * eps)).max() < 1e-6


@pytest.mark.parametrize("name", ENDING_AT_X0)
def test_the_last_step_ends_at_x0(name: str, noise: Callable[..., np.ndarray]) -> None:
    x, x0 = noise(4), noise(4) * 0.5
    last = move(name, x, x0, NEXT, CLEAN, [PreviousStep(NOW, x * 2, x0 * 3)], steps=2, eta=1.0)
    assert np.abs(last - x0).max() < 1e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_stays_float32(name: str, noise: Callable[..., np.ndarray]) -> None:
    x, earlier = (
        noise(4),
        [PreviousStep(NoiseLevel(t, a, 0.9), noise(4), noise(4)) for t, a in ((900.0, 0.1), (750.0, 0.3))],
    )
    facts: dict[str, Any] = {"history": earlier, "denoise": lambda x, level: x, "noise": lambda k: noise(4), "eta": 0.5}
    step = make_step(x, x, NOW, NEXT, **facts)
    corrected = SOLVERS[name].correct
    assert SOLVERS[name].move(step).dtype == np.float32
    assert corrected is None or corrected(step).dtype == np.float32


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - ON_TIMESTEPS))
def test_starting_from_pure_noise_and_ending_without_noise_stays_finite(
    gaussian: Gaussian, name: str, noise: Callable[..., np.ndarray]
) -> None:
    flow = flow_schedule(100)
    levels = plan_levels(flow, (99.0, 60.0, 30.0, 10.0, 0.0))
    assert levels[0].alpha == 0.0 and levels[-2].sigma == 0.0
    with np.errstate(all="raise"):
        end = integrate(name, gaussian.denoise, noise(64), levels, flow)
    assert np.abs(end).max() < 3.0


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_the_vanishing_alpha_of_the_cosine_schedule_does_not_overflow(
    gaussian: Gaussian, name: str, noise: Callable[..., np.ndarray]
) -> None:
    cosine = betas_schedule("squaredcos_cap_v2", 1000)
    levels = plan_levels(cosine, timesteps_for("trailing", 8, cosine))
    assert levels[0].alpha < 1e-4
    with np.errstate(all="raise"):
        end = integrate(name, gaussian.denoise, noise(64), levels, cosine)
    # heun_flow starts where derivatives are meaningless, and mixes them into the following steps
    assert np.abs(end - gaussian.flow(noise(64), levels[0], CLEAN)).max() < (0.3 if name != "heun_flow" else 1.0)


def test_eta_one_adds_the_noise_of_the_ddpm_posterior(noise: Callable[..., np.ndarray]) -> None:
    x, x0, z = noise(4), np.zeros(4, np.float32), np.full(4, 1.0, np.float32)
    with_noise, without = (move("ddim", x, x0, NOW, NEXT, noise=lambda k, z=z: z, eta=1.0) for z in (z, 0 * z))
    added = with_noise - without
    beta = 1 - 0.6**2 / 0.8**2
    assert np.allclose(added, math.sqrt((1 - 0.8**2) / (1 - 0.6**2) * beta), rtol=1e-5)
    for name in ("ddpm", "euler_ancestral"):
        assert np.array_equal(move(name, x, x0, NOW, NEXT, noise=lambda k: z), with_noise)
    large = move("ddpm_large", x, x0, NOW, NEXT, noise=lambda k: z)
    assert np.allclose(large - without, math.sqrt(beta), rtol=1e-5)


def test_lcm_adds_fresh_noise_to_the_consistency_function(noise: Callable[..., np.ndarray]) -> None:
    """At t = 0 the function is x itself; at 20 t = 1 c_skip and c_out are 1/2 and sqrt(1/2)."""
    x, x0, z = noise(4), noise(4) * 0.5, np.full(4, 2.0, np.float32)
    for t, clean in [(0.0, x), (0.05, x / 2 + x0 * math.sqrt(0.5)), (500.0, x0)]:
        moved = move("lcm", x, x0, NOW._replace(t=t), NEXT, noise=lambda k: z)
        assert np.abs(moved - (0.8 * clean + 0.6 * z)).max() < 1e-6
    assert np.abs(move("consistency", x, x0, NOW, NEXT, noise=lambda k: z) - (0.8 * x0 + 0.6 * z)).max() < 1e-6


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_a_step_to_the_same_noise_level_changes_nothing(name: str, noise: Callable[..., np.ndarray]) -> None:
    """Plans may end at the noise level of their last timestep."""
    x = noise(4)
    moved = move(name, x, x * 0.5, NEXT, NEXT, [PreviousStep(NOW, x * 2, x * 3)], denoise=lambda x, level: x * 0.5)
    assert np.abs(moved - x).max() < 1e-6


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_number_of_evaluations_is_the_announced_one(
    mixture: Mixture, noise: Callable[..., np.ndarray], name: str, steps: int
) -> None:
    schedule, evaluated = betas_schedule("squaredcos_cap_v2", 1000), []
    if name in ON_TIMESTEPS:
        steps += 3

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        evaluated.append(level.t)
        return mixture.denoise(x, level)

    plan = SamplingPlan(name, timesteps_for("leading", steps, schedule))
    spec = DenoiserSpec("v", schedule, (1, 4, 4), plan)
    assert network_evaluations(spec) == solver_evaluations(name, steps)
    sampled = list(sample(denoise, noise(4), schedule, plan, lambda k: noise(4)))
    assert [step.t for step in sampled] == list(plan.timesteps) and len(evaluated) == solver_evaluations(name, steps)
    # which also evaluate in the middle of a step, or of the first three
    between = {"dpmpp_sde": steps - 1, "kdpm2": steps - 1, "pndm": 3, "pndm_v": 3}.get(name, 0)
    assert len(set(evaluated)) == steps + between and set(plan.timesteps) <= set(evaluated)


def test_guidance_doubles_the_evaluations_inside_its_interval() -> None:
    flow = flow_schedule(1001)
    plan = make_plan("heun_flow", 5, flow, spacing="flow_trailing", guidance=2.0)
    spec = DenoiserSpec("flow", flow, (1, 4, 4), plan, Conditioning("class", 10, 10))
    assert network_evaluations(spec) == 2 * 9
    # s = 1, 0.8, 0.6, 0.4, 0.2: guided at r = 4 and 1.5 only, each of which is evaluated twice
    plan = SamplingPlan("heun_flow", plan.timesteps, guidance=2.0, guidance_interval=(1.0, 10.0))
    assert network_evaluations(spec.with_plan(plan)) == 9 + 4
    plan = SamplingPlan("heun_flow", plan.timesteps, guidance=2.0, guidance_interval=(1.0, None))
    assert network_evaluations(spec.with_plan(plan)) == 9 + 5


def test_the_first_step_of_plms_is_second_order(gaussian: Gaussian) -> None:
    now, next, x = on_circle(1.0), on_circle(1.0 - 1e-3), np.linspace(-2.0, 2.0, 64)
    x0, exact = gaussian.denoise(x, now), gaussian.flow(x, now, next)
    once = move("ddim", x, x0, now, next)
    again = move("plms", x, x0, now, next, denoise=gaussian.denoise)
    # the error grows with the third power of the step size instead of the second
    assert np.abs(again - exact).max() < 1e-2 * np.abs(once - exact).max()


@pytest.mark.parametrize("row", ADAMS_BASHFORTH)
def test_adams_bashforth_weights_integrate_their_polynomials_exactly(row: Sequence[float]) -> None:
    """Over the unit step from 0, with samples at 0, -1, -2, ...: the integral of t^k is 1 / (k + 1)."""
    for power in range(len(row)):
        assert sum(w * (-i) ** power for i, w in enumerate(row)) == pytest.approx(1 / (power + 1))


def test_an_unknown_solver_is_refused_with_the_nearest_name() -> None:
    for name, nearest in (
        ("dpmpp2m", "dpmpp_2m"),
        ("dpm++-2m", "dpmpp_2m"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++", "dpmpp_"),
    ):
        with pytest.raises(InvalidInputError, match=f"unknown solver '{re.escape(name)}': did you mean '{nearest}"):
            get_solver(name)
    with pytest.raises(InvalidInputError, match="use at least 4"):
        list(sample(lambda x, level: x, np.zeros((1, 1, 2, 2)), LINEAR, make_plan("pndm", 3, LINEAR)))
