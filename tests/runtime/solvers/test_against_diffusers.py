"""The newer solvers against diffusers' schedulers: every step of full trajectories within 1e-4.

The network is a mixture's ideal denoiser in each prediction type. It depends on the noise level only, so it does not
matter which timestep either side passes to its network for a sigma (rounded, truncated or interpolated).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffpress.runtime.denoiser import thresholded  # noqa: E402
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule, betas_schedule, flow_schedule  # noqa: E402
from diffpress.runtime.sampler import sample  # noqa: E402
from diffpress.runtime.sampling_plan import (  # noqa: E402
    SamplingPlan,
    Threshold,
    make_plan,
)
from tests.runtime.conftest import Mixture  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
KINDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}
TOLERANCE = 1e-4
SHAPE = (2, 1, 4, 4)
# in float32 the rounding error of r = 20000 at the end of the cosine schedule exceeds the tolerance
CASES = [
    (kind, prediction, spacing)
    for kind in KINDS
    for prediction in NAMES
    for spacing in ("leading", "trailing", "linspace")
    if not (kind == "squaredcos_cap_v2" and spacing != "leading")
]


def noises(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).standard_normal((count, *SHAPE), dtype=np.float32))


def make_scheduler(name: str, kind: str, prediction: str, spacing: str, **settings: Any) -> tuple[Any, NoiseSchedule]:
    low, high = KINDS[kind]
    options = {"prediction_type": NAMES[prediction], "timestep_spacing": spacing, **settings}
    scheduler = getattr(diffusers, name)(1000, low, high, kind, **options)
    return scheduler, betas_schedule(kind, 1000, low, high)


def ours(
    mixture: Mixture,
    plan: SamplingPlan,
    schedule: NoiseSchedule,
    noise: Sequence[np.ndarray],
    threshold: Threshold | None = None,
) -> list[np.ndarray]:
    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        x0 = mixture.denoise(x, level).astype(np.float32)
        return x0 if threshold is None else thresholded(2 * x0, threshold, (-1.0, 1.0))

    return [step.x for step in sample(denoise, noise[0], schedule, plan, lambda k: noise[k])]


class IdealNetwork:
    """The ideal network output at a noise level, in the scheduler's prediction type; x is variance-preserving."""

    def __init__(self, mixture: Mixture, prediction: str, gain: float = 1.0) -> None:
        self.mixture, self.prediction, self.gain = mixture, prediction, gain

    def __call__(self, x: Tensor, ratio: float) -> Tensor:
        from diffpress.runtime.noise_schedule import NoiseLevel

        alpha = 1.0 if np.isinf(ratio) else 1.0 / np.hypot(1.0, ratio)
        level = NoiseLevel(0.0, alpha, alpha * ratio)
        wide = x.numpy().astype(np.float64)
        x0 = self.gain * self.mixture.denoise(wide, level)
        eps = (wide - level.alpha * x0) / level.sigma
        out = {"sample": x0, "epsilon": eps, "v": level.alpha * eps - level.sigma * x0}[self.prediction]
        return torch.from_numpy(out.astype(np.float32))


def variance_preserving(scheduler: Any, network: IdealNetwork, noise: np.ndarray, steps: int) -> list[np.ndarray]:
    """Return every step of a scheduler that samples x itself (DPM-Solver family)."""
    scheduler.set_timesteps(steps)
    x, found = torch.from_numpy(noise), []
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, float(scheduler.sigmas[k])), t, x).prev_sample
        found.append(x.numpy())
    return found


def assert_close(found: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(found) == len(theirs)
    for k, (a, b) in enumerate(zip(found, theirs, strict=True)):
        # relative to the sample: Heun's first step reaches x = 1000 when it covers the full range
        assert np.abs(a - b).max() <= TOLERANCE * max(1.0, np.abs(b).max()), f"step {k}: {np.abs(a - b).max():.1e}"


SPACINGS = {"leading": "dpm_leading", "trailing": "trailing", "linspace": "dpm_linspace"}


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("kind", "prediction", "spacing"), CASES)
def test_unipc_follows_diffusers(
    mixture: Mixture, kind: str, prediction: str, spacing: str, order: int, steps: int
) -> None:
    scheduler, schedule = make_scheduler("UniPCMultistepScheduler", kind, prediction, spacing, solver_order=order)
    plan = make_plan(f"unipc_{order}", steps, schedule, spacing=SPACINGS[spacing], clip=False)
    noise = noises(1)
    theirs = variance_preserving(scheduler, IdealNetwork(mixture, prediction), noise[0], steps)
    assert_close(ours(mixture, plan, schedule, noise), theirs)


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("kind", "prediction", "spacing"), CASES)
def test_deis_follows_diffusers(
    mixture: Mixture, kind: str, prediction: str, spacing: str, order: int, steps: int
) -> None:
    """Diffusers' DEIS always ends at the noise level of timestep 0."""
    scheduler, schedule = make_scheduler("DEISMultistepScheduler", kind, prediction, spacing, solver_order=order)
    solver = "ddim" if order == 1 else f"deis_{order}"
    plan = make_plan(solver, steps, schedule, spacing=SPACINGS[spacing], clip=False, end=0.0)
    noise = noises(1)
    theirs = variance_preserving(scheduler, IdealNetwork(mixture, prediction), noise[0], steps)
    assert_close(ours(mixture, plan, schedule, noise), theirs)


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("kind", "prediction", "spacing"), CASES)
def test_dpmpp_3m_follows_diffusers(
    mixture: Mixture, kind: str, prediction: str, spacing: str, final: str, steps: int
) -> None:
    settings = {"solver_order": 3, "final_sigmas_type": final}
    scheduler, schedule = make_scheduler("DPMSolverMultistepScheduler", kind, prediction, spacing, **settings)
    end = None if final == "zero" else 0.0
    plan = make_plan("dpmpp_3m", steps, schedule, spacing=SPACINGS[spacing], clip=False, end=end)
    noise = noises(1)
    theirs = variance_preserving(scheduler, IdealNetwork(mixture, prediction), noise[0], steps)
    assert_close(ours(mixture, plan, schedule, noise), theirs)


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("kind", "prediction", "spacing"), CASES)
def test_sde_dpmpp_follows_diffusers(
    mixture: Mixture, kind: str, prediction: str, spacing: str, order: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"solver_order": order, "algorithm_type": "sde-dpmsolver++"}
    scheduler, schedule = make_scheduler("DPMSolverMultistepScheduler", kind, prediction, spacing, **settings)
    plan = make_plan("ddpm" if order == 1 else "dpmpp_2m_sde", steps, schedule, spacing=SPACINGS[spacing], clip=False)
    noise = noises(steps + 1)
    fresh = iter(noise[1:])
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: torch.from_numpy(next(fresh)))
    theirs = variance_preserving(scheduler, IdealNetwork(mixture, prediction), noise[0], steps)
    assert_close(ours(mixture, plan, schedule, noise), theirs)


@pytest.mark.parametrize("threshold", [Threshold(0.9, 1.5), Threshold(0.995, 1.0), Threshold(0.7, 10.0)])
def test_dynamic_thresholding_follows_diffusers(mixture: Mixture, threshold: Threshold) -> None:
    settings = {
        "thresholding": True,
        "dynamic_thresholding_ratio": threshold.ratio,
        "sample_max_value": threshold.max,
    }
    scheduler, schedule = make_scheduler("DPMSolverMultistepScheduler", "linear", "sample", "leading", **settings)
    plan = make_plan("dpmpp_2m", 8, schedule, spacing="dpm_leading", clip=False)
    noise = noises(1)
    theirs = variance_preserving(scheduler, IdealNetwork(mixture, "sample", gain=2.0), noise[0], 8)
    assert_close(ours(mixture, plan, schedule, noise, threshold), theirs)


# --- schedulers that sample X = x / alpha, x = X / sqrt(1 + r^2) ---------------------------------------------


def variance_exploding(
    scheduler: Any, network: IdealNetwork, noise: np.ndarray, steps: int
) -> tuple[list[Tensor], list[float]]:
    """Return the samples after every scheduler step and the ratio sigma / alpha before each."""
    scheduler.set_timesteps(steps)
    x, found, levels = torch.from_numpy(noise) * scheduler.init_noise_sigma, [], []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        nonzero = scaled.abs() > 1e-3
        ratio = float(torch.sqrt(((x[nonzero] / scaled[nonzero]) ** 2).double().mean() - 1))
        levels.append(ratio)
        x = scheduler.step(network(scaled, ratio), t, x).prev_sample
        found.append(x)
    return found, levels


SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
EXPLODING_CASES = [(k, p, s, "") for k, p, s in CASES if p != "sample"] + [
    (kind, "epsilon", "linspace", option) for kind in ("linear", "scaled_linear") for option in SIGMAS
]
SPACING_OF = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}


def exploding_plan(solver: str, schedule: NoiseSchedule, spacing: str, option: str, steps: int) -> SamplingPlan:
    from diffpress.runtime.timesteps import timesteps_for

    start = "marginal" if spacing == "leading" else "noise"
    timesteps = timesteps_for(SPACING_OF.get(option, spacing), steps, schedule, integer=False)
    return SamplingPlan(solver, timesteps, clip=False, start=start)


def as_variance_preserving(found: list[Tensor], levels: list[float], every: slice) -> list[np.ndarray]:
    after = [*levels[1:], 0.0]
    return [(x / np.hypot(1.0, r)).numpy() for x, r in list(zip(found, after, strict=True))[every]]


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize(("kind", "prediction", "spacing", "option"), EXPLODING_CASES)
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_euler_and_its_ancestral_form_follow_diffusers(
    mixture: Mixture,
    name: str,
    kind: str,
    prediction: str,
    spacing: str,
    option: str,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless the spacing is leading, these schedulers scale the initial noise by sigma alone."""
    if "Ancestral" in name and option:
        option = ""  # it has no such options
    pytest.importorskip("scipy")
    scheduler, schedule = make_scheduler(name, kind, prediction, spacing, **({option: True} if option else {}))
    noise = noises(steps + 1)
    fresh = iter(noise[1:])
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: torch.from_numpy(next(fresh)))
    found, levels = variance_exploding(scheduler, IdealNetwork(mixture, prediction), noise[0], steps)
    solver = "euler_ancestral" if "Ancestral" in name else "euler"
    plan = exploding_plan(solver, schedule, spacing, option, steps)
    assert_close(ours(mixture, plan, schedule, noise), as_variance_preserving(found, levels, slice(None)))


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize(("kind", "prediction", "spacing", "option"), EXPLODING_CASES)
def test_heun_follows_diffusers(
    mixture: Mixture, kind: str, prediction: str, spacing: str, option: str, steps: int
) -> None:
    pytest.importorskip("scipy")
    scheduler, schedule = make_scheduler(
        "HeunDiscreteScheduler", kind, prediction, spacing, **({option: True} if option else {})
    )
    noise = noises(1)
    found, levels = variance_exploding(scheduler, IdealNetwork(mixture, prediction), noise[0], steps)
    plan = exploding_plan("heun", schedule, spacing, option, steps)
    assert len(found) == 2 * steps - 1  # predictor and corrector in every step but the last
    expected = as_variance_preserving(found, levels, slice(1, None, 2)) + as_variance_preserving(
        found, levels, slice(-1, None)
    )
    assert_close(ours(mixture, plan, schedule, noise), expected)


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize(("kind", "prediction", "spacing", "option"), EXPLODING_CASES)
def test_dpm_solver_sde_follows_diffusers(
    mixture: Mixture, kind: str, prediction: str, spacing: str, option: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its noise comes from one Brownian motion in r: W(r) - W(middle), and W(r) - W(r'), which contains the former."""
    low, high = KINDS[kind]
    settings = {"prediction_type": NAMES[prediction], "timestep_spacing": spacing} | ({option: True} if option else {})
    scheduler = _sde_module(monkeypatch).DPMSolverSDEScheduler(1000, low, high, kind, **settings)
    schedule = betas_schedule(kind, 1000, low, high)
    noise = noises(2 * steps + 1)
    intervals: list[tuple[float, float]] = []

    def brownian(high: Any, low: Any) -> Tensor:
        """Return the increments over the two intervals of a step, the first inside the second."""
        index, inside = divmod(len(intervals), 2)
        high, low = float(high), float(low)
        intervals.append((high, low))
        first, rest = noise[1 + index], noise[1 + index + steps]
        if not inside:
            return torch.from_numpy(first)
        middle = intervals[-2][1]
        mixed = (np.sqrt(high - middle) * first + np.sqrt(middle - low) * rest) / np.sqrt(high - low)
        return torch.from_numpy(mixed.astype(np.float32))

    scheduler.set_timesteps(steps)
    scheduler.noise_sampler, scheduler.set_timesteps = brownian, lambda steps: None
    found, levels = variance_exploding(scheduler, IdealNetwork(mixture, prediction), noise[0], steps)
    plan = exploding_plan("dpmpp_sde", schedule, spacing, option, steps)
    expected = as_variance_preserving(found, levels, slice(1, None, 2)) + as_variance_preserving(
        found, levels, slice(-1, None)
    )
    assert_close(ours(mixture, plan, schedule, noise), expected)


def _sde_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the diffusers module without torchsde, its optional noise source, which is not used here."""
    name = "diffusers.schedulers.scheduling_dpmsolver_sde"
    if name not in sys.modules and "torchsde" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    import importlib

    return importlib.import_module(name)


# --- DDPM, flows --------------------------------------------


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("kind", "prediction"), sorted({(kind, prediction) for kind, prediction, _ in CASES}))
def test_ddpm_follows_diffusers(
    mixture: Mixture, kind: str, prediction: str, variance: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"variance_type": variance, "clip_sample": False}
    scheduler, schedule = make_scheduler("DDPMScheduler", kind, prediction, "leading", **settings)
    scheduler.set_timesteps(steps)
    solver = {"fixed_small": "ddpm", "fixed_large": "ddpm_large"}[variance]
    plan = make_plan(solver, steps, schedule, spacing="leading", clip=False)
    noise = noises(steps + 1)
    fresh = iter(noise[1:])
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", lambda *a, **o: torch.from_numpy(next(fresh))
    )
    network, x, theirs = IdealNetwork(mixture, prediction), torch.from_numpy(noise[0]), []
    for t in scheduler.timesteps:
        abar = float(scheduler.alphas_cumprod[t])
        x = scheduler.step(network(x, ((1 - abar) / abar) ** 0.5), t, x).prev_sample
        theirs.append(x.numpy())
    assert_close(ours(mixture, plan, schedule, noise), theirs)


def flow_output(mixture: Mixture, x: Tensor, s: float) -> Tensor:
    from diffpress.runtime.noise_schedule import NoiseLevel

    level = NoiseLevel(0.0, 1.0 - s, s)
    wide = x.numpy().astype(np.float64)
    x0 = mixture.denoise(wide, level)
    return torch.from_numpy(((wide - level.alpha * x0) / level.sigma - x0).astype(np.float32))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 7])
def test_heun_on_flows_follows_diffusers(mixture: Mixture, shift: float, steps: int) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(1000, shift=shift)
    scheduler.set_timesteps(steps)
    noise, theirs = noises(1), []
    x = torch.from_numpy(noise[0])
    for t in scheduler.timesteps:
        x = scheduler.step(flow_output(mixture, x, float(t) / 1000), t, x).prev_sample
        theirs.append(x.numpy())
    timesteps = tuple(float(t) for t in dict.fromkeys(scheduler.timesteps.tolist()))
    plan = SamplingPlan("heun_flow", timesteps, clip=False)
    assert_close(ours(mixture, plan, flow_schedule(1001), noise), [*theirs[1::2], theirs[-1]])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_unipc_on_flows_follows_diffusers(mixture: Mixture, shift: float, steps: int, order: int) -> None:
    settings = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    scheduler = diffusers.UniPCMultistepScheduler(1000, solver_order=order, **settings)
    scheduler.set_timesteps(steps)
    noise, theirs = noises(1), []
    x = torch.from_numpy(noise[0])
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(flow_output(mixture, x, float(scheduler.sigmas[k])), t, x).prev_sample
        theirs.append(x.numpy())
    levels = [1000.0 * float(s) for s in scheduler.sigmas[:-1]]
    plan = SamplingPlan(f"unipc_{order}", (1000.0, *levels[1:]), clip=False)
    assert_close(ours(mixture, plan, flow_schedule(1001), noise), theirs)
    # the same when started from diffusers' exact noise level
    assert_close(ours(mixture, replace(plan, timesteps=tuple(levels)), flow_schedule(1001), noise), theirs)
