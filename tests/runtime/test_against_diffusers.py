"""Full trajectories against diffusers' schedulers: same network, same noise, every step within 1e-4.

diffusers keeps its tables in float32; 1e-4 corresponds to about a hundred roundings of numbers of order one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffpress.runtime.denoiser import make_denoiser  # noqa: E402
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule, flow_schedule, noise_level_at  # noqa: E402
from diffpress.runtime.sampler import sample  # noqa: E402
from diffpress.runtime.sampling_plan import SamplingPlan, make_plan  # noqa: E402
from diffpress.runtime.solvers import solver_evaluations  # noqa: E402
from diffpress.runtime.spec import DenoiserSpec  # noqa: E402
from diffpress.runtime.timesteps import timesteps_for  # noqa: E402
from tests.runtime.conftest import FakeNetwork, Mixture  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
KINDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}
# both implementations know epsilon at the end of the cosine schedule (alpha 5e-5) only to 1e-7 / 5e-5
COMBINATIONS = [
    (kind, prediction, spacing)
    for kind in KINDS
    for prediction in NAMES
    for spacing in ("leading", "trailing", "linspace")
    if not (kind == "squaredcos_cap_v2" and prediction == "epsilon" and spacing != "leading")
]
TOLERANCE = 1e-4


def close(ours: np.ndarray, theirs: Any) -> bool:
    return bool(np.abs(ours - np.asarray(theirs)).max() <= TOLERANCE)


def ours_and_network(
    fake_network: type[FakeNetwork],
    kind: str,
    prediction: str,
    plan_of: Callable[[NoiseSchedule], SamplingPlan],
    noise: np.ndarray,
    fresh: Callable[[int], np.ndarray] | None = None,
) -> tuple[list[np.ndarray], SamplingPlan, FakeNetwork]:
    schedule = betas_schedule(kind, 1000, *KINDS[kind])
    plan = plan_of(schedule)
    network = fake_network(prediction, schedule)
    spec = DenoiserSpec(prediction, schedule, (1, 4, 4), plan)
    denoise = make_denoiser(network, spec, clip=plan.clip)
    steps = sample(denoise, noise, schedule, plan, fresh) if fresh else sample(denoise, noise, schedule, plan)
    return [step.x for step in steps], plan, network


def evaluate(network: FakeNetwork, x: Tensor, t: Any) -> Tensor:
    """Return the network's output for a torch tensor."""
    inputs = {"sample": x.numpy().astype(np.float32), "timestep": np.full(len(x), float(t), np.float32)}
    return torch.from_numpy(network.run(inputs))


# diffusers' DDIM always steps to t - T // N, which is not the next timestep of its own linspace
@pytest.mark.parametrize(("kind", "prediction", "spacing"), [c for c in COMBINATIONS if c[2] != "linspace"])
@pytest.mark.parametrize(("eta", "clip"), [(0.0, False), (0.6, False), (0.0, True)])
def test_ddim_follows_diffusers(
    fake_network: type[FakeNetwork],
    noise: Callable[..., np.ndarray],
    kind: str,
    prediction: str,
    spacing: str,
    eta: float,
    clip: bool,
) -> None:
    start, fresh = noise(3, 1, 4, 4), noise(11, 3, 1, 4, 4)[1:]

    def plan_of(schedule: NoiseSchedule) -> SamplingPlan:
        return make_plan("ddim", 10, schedule, spacing=spacing, eta=eta, clip=clip)

    ours, plan, network = ours_and_network(fake_network, kind, prediction, plan_of, start, lambda k: fresh[k - 1])
    low, high = KINDS[kind]
    scheduler = diffusers.DDIMScheduler(
        1000, low, high, kind, clip_sample=clip, prediction_type=NAMES[prediction], timestep_spacing=spacing
    )
    scheduler.set_timesteps(10)
    x = torch.from_numpy(start)
    for k, t in enumerate(scheduler.timesteps):
        out = evaluate(network, x, t)
        options: dict[str, Any] = {"use_clipped_model_output": clip}  # as ours: eps is computed from the clipped x_0
        if eta:
            options["variance_noise"] = torch.from_numpy(fresh[k])
        x = scheduler.step(out, t, x, eta=eta, **options).prev_sample
        assert int(t) == plan.timesteps[k] and close(ours[k], x), f"step {k}"


EULER = [
    (kind, prediction, spacing)
    for kind, prediction, spacing in COMBINATIONS
    # it does not support sample prediction, and X = 20000 at the end of the cosine schedule has 2e-3 rounding error
    if prediction != "sample" and not (kind == "squaredcos_cap_v2" and spacing != "leading")
]


@pytest.mark.parametrize(("kind", "prediction", "spacing"), EULER)
def test_euler_follows_diffusers(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray], kind: str, prediction: str, spacing: str
) -> None:
    """Diffusers samples X = x / alpha; x = X / sqrt(1 + sigma^2). With 10 steps its linspace is integer as well."""
    start = noise(3, 1, 4, 4)
    ours, _, network = ours_and_network(
        fake_network, kind, prediction, lambda s: make_plan("euler", 10, s, spacing=spacing, clip=False), start
    )
    low, high = KINDS[kind]
    scheduler = diffusers.EulerDiscreteScheduler(
        1000, low, high, kind, prediction_type=NAMES[prediction], timestep_spacing=spacing
    )
    scheduler.set_timesteps(10)
    x = torch.from_numpy(start) * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for k, t in enumerate(scheduler.timesteps):
        out = evaluate(network, scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x).prev_sample
        assert close(ours[k], x / (scheduler.sigmas[k + 1] ** 2 + 1) ** 0.5), f"step {k}"


@pytest.mark.parametrize(
    ("kind", "prediction", "spacing"),
    [*COMBINATIONS, *((kind, "v", spacing) for kind in KINDS for spacing in ("quad", "karras", "logsnr"))],
)
def test_dpm_solver_follows_diffusers(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray], kind: str, prediction: str, spacing: str
) -> None:
    start = noise(3, 1, 4, 4)
    ours, plan, network = ours_and_network(
        fake_network, kind, prediction, lambda s: make_plan("dpmpp_2m", 10, s, spacing=spacing, clip=False), start
    )
    low, high = KINDS[kind]
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, low, high, kind, prediction_type=NAMES[prediction])
    scheduler.set_timesteps(timesteps=[int(t) for t in plan.timesteps])
    x = torch.from_numpy(start)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(evaluate(network, x, t), t, x).prev_sample
        assert close(ours[k], x), f"step {k}"


PLMS = [(kind, prediction) for kind in KINDS for prediction in ("epsilon", "v")]


@pytest.mark.parametrize(("kind", "prediction"), PLMS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 20, 50])
def test_plms_follows_diffusers(
    fake_network: type[FakeNetwork],
    noise: Callable[..., np.ndarray],
    kind: str,
    prediction: str,
    offset: int,
    clean: bool,
    steps: int,
) -> None:
    """Diffusers' first two steps are our first, and its second timestep is repeated."""
    start = noise(3, 1, 4, 4)
    solver = {"epsilon": "plms", "v": "plms_v"}[prediction]

    def plan_of(schedule: NoiseSchedule) -> SamplingPlan:
        timesteps = timesteps_for("leading", steps, schedule, offset=offset)
        return SamplingPlan(solver, timesteps, clip=False, end=None if clean else 0.0)

    ours, _, network = ours_and_network(fake_network, kind, prediction, plan_of, start)
    low, high = KINDS[kind]
    options = {"skip_prk_steps": True, "set_alpha_to_one": clean, "steps_offset": offset}
    scheduler = diffusers.PNDMScheduler(1000, low, high, kind, prediction_type=NAMES[prediction], **options)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == solver_evaluations(solver, steps) == len(network.calls)
    x, theirs = torch.from_numpy(start), []
    for t in scheduler.timesteps:
        x = scheduler.step(evaluate(network, x, t), t, x).prev_sample
        theirs.append(x)
    assert [call["timestep"][0] for call in network.calls[: len(theirs)]] == scheduler.timesteps.tolist()
    for k, other in enumerate(theirs[1:] if steps > 1 else theirs):
        assert close(ours[k], other), f"step {k}"


def test_flow_follows_diffusers_at_fractional_timesteps(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray]
) -> None:
    start, sigmas = noise(3, 1, 4, 4), [1.0, 0.8125, 0.6007, 0.3333, 0.1111]
    schedule = flow_schedule(1001)  # so that sigma = t / 1000, as in diffusers
    plan = SamplingPlan("euler", tuple(1000 * s for s in sigmas), clip=False)
    network = fake_network("flow", schedule, timestep_type=np.dtype(np.float32))
    spec = DenoiserSpec("flow", schedule, (1, 4, 4), plan)
    ours = [step.x for step in sample(make_denoiser(network, spec, clip=False), start, schedule, plan)]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(sigmas=sigmas)
    x = torch.from_numpy(start)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(evaluate(network, x, t), t, x).prev_sample
        assert close(ours[k], x), f"step {k}"


def test_karras_euler_follows_diffusers_at_fractional_timesteps(
    mixture: Mixture, noise: Callable[..., np.ndarray]
) -> None:
    """The denoiser depends on the noise level only, as diffusers rounds fractional timesteps differently."""
    pytest.importorskip("scipy")
    schedule, start = betas_schedule("linear", 1000), noise(3, 1, 4, 4)
    plan = SamplingPlan("euler", timesteps_for("karras", 10, schedule, integer=False), clip=False)
    ours = [step.x for step in sample(mixture.denoise, start, schedule, plan)]
    scheduler = diffusers.EulerDiscreteScheduler(1000, timestep_spacing="linspace", use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    x = torch.from_numpy(start) * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for k, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        level = noise_level_at(schedule, plan.timesteps[k])
        eps = (scaled.numpy() - level.alpha * mixture.denoise(scaled.numpy(), level)) / level.sigma
        x = scheduler.step(torch.from_numpy(eps.astype(np.float32)), t, x).prev_sample
        assert close(ours[k], x / (scheduler.sigmas[k + 1] ** 2 + 1) ** 0.5), f"step {k}"
