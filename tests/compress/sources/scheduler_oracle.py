"""Trajectories of a scheduler of diffusers and of the plan that we read from its config, around one analytic network.

The network is x_0 = 0.9 sin(2x + t / 400) in the prediction type of the scheduler. It depends on the timestep that it
is given, so a wrongly rounded timestep shows.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffpress.compress.sources.scheduler_config import SchedulerFacts, read_scheduler, scheduler_facts
from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.denoiser import thresholded
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule, noise_level_at
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.sampler import sample
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec

WHERE = Path("model/scheduler/scheduler_config.json")
SHAPE = (2, 3, 4, 4)
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
RIGHT_DB = 90.0
Network = Callable[[np.ndarray, float], np.ndarray]


def build_scheduler(name: str, settings: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(diffusers, name)(**settings)


def saved_config(scheduler: Any) -> dict[str, Any]:
    """Return the config as `save_pretrained` writes it."""
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    return config


def spec_of(facts: SchedulerFacts, steps: int, sample_shape: tuple[int, ...] = SHAPE[1:]) -> DenoiserSpec:
    """Return the spec of a latent model that is sampled with these facts."""
    plan = SamplingPlan(
        facts.solver, (0.0,), clip=facts.clip, end=facts.end, start=facts.start, threshold=facts.threshold
    )
    spec = DenoiserSpec(
        facts.prediction,
        facts.schedule,
        sample_shape,
        plan,
        conditioning=Conditioning("text"),  # whose networks take fractional timesteps
        spacing=facts.spacing,
        solver_settings=facts.solver_settings,
    )
    return spec.with_plan(plan.spaced(facts.spacing, steps, facts.schedule, spec.tokens(spec.sample_shape)))


def read_spec(
    config: dict[str, Any],
    steps: int,
    with_settings: bool = True,
    pipeline_sigmas: bool | None = None,
    sample_shape: tuple[int, ...] = SHAPE[1:],
) -> DenoiserSpec:
    """Return the spec of a latent model with this scheduler, after a round trip through its JSON form.

    Without settings the other solvers are not read, which takes most of the time.
    """
    if with_settings:
        facts = read_scheduler(config, WHERE, True, pipeline_sigmas)
    else:
        facts = scheduler_facts(config, str(config["_class_name"]), pipeline_sigmas)
    return DenoiserSpec.from_json(json.loads(json.dumps(spec_of(facts, steps, sample_shape).to_json())))


def network_of(prediction: str, schedule: NoiseSchedule, dtype: type = np.float32) -> Network:
    def network(x: np.ndarray, t: float) -> np.ndarray:
        level = noise_level_at(schedule, min(max(float(t), 0.0), len(schedule) - 1))
        x0 = 0.9 * np.sin(2 * x.astype(np.float64) + t / 400)
        if prediction == "sample":
            return x0.astype(dtype)
        eps = (x - level.alpha * x0) / max(level.sigma, 1e-3)
        out = {"epsilon": eps, "v": level.alpha * eps - level.sigma * x0, "flow": eps - x0}[prediction]
        return np.asarray(out, dtype)

    return network


def draw_noise(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).standard_normal((count, *SHAPE), dtype=np.float32))


def our_sample(spec: DenoiserSpec, noise: list[np.ndarray], network: Network | None = None) -> np.ndarray:
    plan = spec.plan
    network = network or network_of(spec.prediction, spec.schedule)

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        x0 = to_x0(spec.prediction, x, network(x, level.t), level)
        if plan.threshold is not None:
            return thresholded(x0, plan.threshold, (-1.0, 1.0))
        return np.clip(x0, -1, 1) if plan.clip else x0

    return list(sample(denoise, noise[0], spec.schedule, plan, lambda k: noise[k]))[-1].x


class DoubleTorch:
    """The module torch with float64 in the place of float32, so that a scheduler does not round its samples."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def their_sample(
    scheduler: Any, spec: DenoiserSpec, noise: list[np.ndarray], network: Network | None = None, double: bool = False
) -> np.ndarray:
    """Run diffusers' sampling loop after `set_timesteps`, with the same noise in every step."""
    fresh = iter(noise[1:])
    module: Any = sys.modules[type(scheduler).__module__]
    replaced: dict[str, Any] = {"randn_tensor": lambda *args, **kwargs: torch.from_numpy(next(fresh))}
    replaced |= {"torch": DoubleTorch()} if double else {}
    originals = {name: getattr(module, name) for name in replaced if hasattr(module, name)}
    network = network or network_of(spec.prediction, spec.schedule)
    if double and hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()  # the values stay rounded, what is computed from them does not
    x = torch.from_numpy(noise[0]) * getattr(scheduler, "init_noise_sigma", 1.0)
    try:
        for name in originals:
            setattr(module, name, replaced[name])
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(torch.from_numpy(network(scaled.numpy(), float(t))), t, x).prev_sample
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
    return x.numpy()


def psnr_db(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the PSNR of data in -1..1, or of the range of `theirs` if that is wider."""
    peak = max(2.0, float(np.abs(theirs).max()))
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2))
    return 200.0 if error == 0.0 else 10.0 * float(np.log10(peak**2 / error))


def compare_db(scheduler: Any, spec: DenoiserSpec, steps: int, mu: float | None = None, double: bool = False) -> float:
    """Return the PSNR between diffusers' sample and ours, with samples in float32 or float64.

    It is NaN if diffusers itself fails, or divides by zero.
    """
    scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    dtype = np.float64 if double else np.float32
    noise = [part.astype(dtype) for part in draw_noise(2 * steps + 16)]
    network = network_of(spec.prediction, spec.schedule, dtype)
    ours = our_sample(spec, noise, network)
    try:
        theirs = their_sample(scheduler, spec, noise, network, double)
    except Exception:  # it raises many types
        return float("nan")
    return psnr_db(ours, theirs) if np.isfinite(theirs).all() else float("nan")


def agrees(scheduler: Any, spec: DenoiserSpec, steps: int) -> bool:
    """Whether both samples agree to 90 dB, in float64 where the float32 of diffusers does not."""
    return compare_db(scheduler, spec, steps) >= RIGHT_DB or compare_db(scheduler, spec, steps, double=True) >= RIGHT_DB
