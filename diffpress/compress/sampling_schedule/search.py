"""The best N timesteps for a solver: dynamic programming over the model's own trajectories, then a search around them.

GITS (Chen et al. 2024, "On the trajectory regularity of ODE-based diffusion sampling", section 4): on trajectories of a
fine grid t_0 > t_1 > ... > end, with x(i -> j) where one Euler step from x_i leads,

    cost[i, j] = mean over samples of |x(i -> j) - x_j|         one jump's error: no call but those of the trajectory
    V_1[i] = cost[i, end],   V_k[i] = min_j cost[i, j] + gamma V_(k-1)[j]

and the path behind V_N[0] is the schedule; with gamma above 1 late errors weigh more. The paper takes Euler's cost for
multistep solvers too. It measures in X = x / alpha; there the errors next to pure noise drown all others where a table
goes as far as a cosine one (r = 20000): on the built-in teacher, iPNDM over 5 steps, its path came within 0.141 of the
fine grid, that by x within 0.099, and even timesteps within 0.151. Which gamma suits the solver at hand is measured:
each path, and the plan's own timesteps, are walked from the same noise, and the one whose samples lie nearest to the
fine grid's is kept,

    loss = mean over samples of |x_end - x_end(fine grid)|

`refine` rounds then move one timestep at a time towards a lower loss: the aim of LD3 (Tong et al. 2024: learned
timesteps that make the student's samples the teacher's) with a pattern search in place of gradients, as there are but
N numbers. Nothing here sees a feature network that scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from diffpress.compress.config import ScheduleConfig
from diffpress.compress.context import say
from diffpress.compress.progress import progress
from diffpress.runtime.denoiser import Denoise, plan_denoiser
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs, Network
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.sampler import noise_for, sample
from diffpress.runtime.sampling_plan import SamplingPlan, plan_levels
from diffpress.runtime.solvers import with_solver
from diffpress.runtime.solvers.contract import transfer
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import timesteps_for

SEARCH_SEED = 7_000_000  # far from the seeds that people sample, calibrate and evaluate with
GAMMAS = (0.8, 0.9, 1.0, 1.15)  # 1.15 is the paper's
TEACHER = "dpmpp_2m"  # walks the fine grid
FIRST_MOVE = 0.25  # of the gap to the neighbour, in the first round of `refine`
LEAST_MOVE = 0.5  # timesteps, below which a timestep rests

Timesteps = tuple[float, ...]


def search(
    network: Network, spec: DenoiserSpec, config: ScheduleConfig, conditions: ConditioningInputs
) -> tuple[Timesteps, dict[str, Any]]:
    """The timesteps for the solver of the spec's plan, as many as it has, and what was measured on the way.

    `conditions` are what `config.samples` samples are told. Raises InvalidInputError where the samples of the fine grid are no
    numbers.
    """
    fine = fine_timesteps(spec, config.fine)
    costs, ends = jump_costs(network, spec, fine, config.samples, config.batch, conditions)
    steps = spec.plan.steps
    paths = {f"gits {gamma:g}": tuple(fine[i] for i in best_path(costs, steps, gamma)) for gamma in GAMMAS}

    def loss_of(timesteps: Timesteps) -> float:
        return loss(network, spec, timesteps, ends, config.batch, conditions)

    losses, best = {"own": loss_of(spec.plan.timesteps)}, spec.plan.timesteps
    seen = {spec.plan.timesteps: losses["own"]}
    for name, path in paths.items():
        losses[name] = seen[path] = seen[path] if path in seen else loss_of(path)
        best = path if losses[name] < seen[best] else best
    shown = {name: round(value, 5) for name, value in losses.items()}
    say(f"search: distance to {config.fine} steps of {TEACHER}: {shown}")
    if config.refine:
        best, seen[best] = refined(
            best, seen[best], loss_of, config.refine, len(spec.schedule) - 1, spec.spacing.integer
        )
        shown["refined"] = round(seen[best], 5)
        say(f"search: refined to {shown['refined']}")
    return best, {"timesteps": list(best), "loss": shown, "samples": config.samples, "fine": list(fine)}


def fine_timesteps(spec: DenoiserSpec, count: int) -> Timesteps:
    """About `count` timesteps from the plan's first on: half of them even in t, half in log-SNR, and the plan's own.

    Where steps are best taken lies between these two: few models want less of either.
    """
    first, halves = spec.plan.timesteps[0], (count // 2, count - count // 2)
    kinds = zip(("trailing", "logsnr"), halves, strict=True)
    within = {t for kind, half in kinds for t in timesteps_for(kind, half, spec.schedule) if t < first}
    return tuple(sorted(within | set(spec.plan.timesteps), reverse=True))


def jump_costs(
    network: Network, spec: DenoiserSpec, fine: Timesteps, count: int, batch: int, conditions: ConditioningInputs
) -> tuple[np.ndarray, np.ndarray]:
    """cost[i, j] over the fine grid and the end behind it, float64 [M + 1, M + 1], and the ends [N, C, H, W]."""
    own = spec.plan
    plan = replace(with_solver(own, TEACHER), timesteps=fine, start=own.start, end=own.end)
    levels = plan_levels(spec.schedule, fine, plan.end)
    total, ends = np.zeros((len(levels), len(levels))), []
    for part in _parts(count, batch, "search: fine grid"):
        ask = plan_denoiser(network, spec.with_plan(plan), conditions.part(part))
        visited: list[tuple[np.ndarray, np.ndarray]] = []

        def denoise(x: np.ndarray, level: NoiseLevel, ask: Denoise = ask, visited: list[Any] = visited) -> np.ndarray:
            visited.append((x, ask(x, level)))
            return visited[-1][1]

        end = _end(denoise, spec, plan, part)
        states = [*(x for x, _ in visited), end]
        for i, (x, x0) in enumerate(visited):
            for j in range(i + 1, len(levels)):
                total[i, j] += _sizes(transfer(x, x0, levels[i], levels[j]) - states[j]).sum()
        ends.append(end)
    final = np.concatenate(ends)
    if not np.isfinite(final).all():
        raise InvalidInputError(
            "schedule: the samples of the fine grid hold NaN or infinite values; nothing can be searched"
        )
    return total / count, final


def best_path(costs: np.ndarray, steps: int, gamma: float) -> tuple[int, ...]:
    """The `steps` places, the first of them 0, from which to jump on to the next and in the end to the last place."""
    last = len(costs) - 1
    reach = np.where(np.triu(np.ones_like(costs, dtype=bool), 1), costs, np.inf)
    values, choices = reach[:, last].copy(), []
    for _ in range(steps - 1):
        through = reach[:, :last] + gamma * values[None, :last]
        choices.append(through.argmin(axis=1))
        values = through.min(axis=1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return tuple(path)


def loss(
    network: Network,
    spec: DenoiserSpec,
    timesteps: Timesteps,
    ends: np.ndarray,
    batch: int,
    conditions: ConditioningInputs,
) -> float:
    """How far the plan over these timesteps ends from `ends` [N, C, H, W], from the same noise: mean over samples."""
    plan, total = spec.plan.over(timesteps), 0.0
    for part in _parts(len(ends), batch):
        denoise = plan_denoiser(network, spec.with_plan(plan), conditions.part(part))
        total += float(_sizes(_end(denoise, spec, plan, part) - ends[part]).sum())
    value = total / len(ends)
    return value if np.isfinite(value) else np.inf


def refined(
    timesteps: Timesteps, value: float, loss_of: Callable[[Timesteps], float], rounds: int, top: float, whole: bool
) -> tuple[Timesteps, float]:
    """The timesteps after `rounds` of moving each in turn, and their loss, which is never above `value`.

    A timestep moves by a share of the gap below it, further after a success, half as far the other way after none. It
    stays between its neighbours, `top` and 0, and on whole numbers where they are `whole`.
    """
    best = list(timesteps)
    moves = [FIRST_MOVE * (t - below) for t, below in zip(best, [*best[1:], 0.0], strict=True)]
    with progress("search: refine", rounds) as advance:
        for done in range(1, rounds + 1):
            for k, old in enumerate(tuple(best)):
                for move in (moves[k], -moves[k]):
                    moved = float(round(old + move)) if whole else old + move
                    above, below = [top + 1.0, *best][k], [*best, -1.0][k + 1]
                    if moved == old or not below < moved < above or not 0.0 <= moved <= top:
                        continue
                    candidate = (*best[:k], moved, *best[k + 1 :])
                    found = loss_of(candidate)
                    if found < value:
                        best, value, moves[k] = list(candidate), found, 1.5 * move
                        break
                else:
                    moves[k] = 0.5 * moves[k]
            advance(done, f"{value:.5f}")
            if max(map(abs, moves)) < LEAST_MOVE:
                break
    return tuple(best), value


def _end(denoise: Denoise, spec: DenoiserSpec, plan: SamplingPlan, part: slice) -> np.ndarray:
    """Where the plan leads that part of the search's samples."""
    seeds = range(SEARCH_SEED, SEARCH_SEED + part.stop)[part]
    (*_, last) = sample(denoise, noise_for(seeds, spec.sample_shape), spec.schedule, plan)
    return last.x


def _parts(count: int, batch: int, what: str | None = None) -> Iterator[slice]:
    slices = [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
    with progress(what, len(slices)) if what else nullcontext() as advance:
        for done, part in enumerate(slices, 1):
            yield part
            if advance is not None:
                advance(done)


def _sizes(apart: np.ndarray) -> np.ndarray:
    """Root mean square of each sample [N, ...], float64 [N]."""
    rms: np.ndarray = np.sqrt(np.square(apart.reshape(len(apart), -1), dtype=np.float64).mean(axis=1))
    return rms
