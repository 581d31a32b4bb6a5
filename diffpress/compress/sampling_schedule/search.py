"""Search for the best N timesteps of a solver: dynamic programming (GITS), then refinement.

GITS (Chen et al. 2024, "On the trajectory regularity of ODE-based diffusion sampling", section 4). On the model's
trajectories over fine timesteps t_0 > t_1 > ... > end, let x(i -> j) be the result of one Euler step from x_i to t_j:

    cost[i, j] = mean over samples of |x(i -> j) - x_j|         needs no evaluations besides those of the trajectory
    V_1[i] = cost[i, end],   V_k[i] = min_j cost[i, j] + gamma V_(k-1)[j]

The path of V_N[0] gives the timesteps; gamma above 1 gives late errors more weight. Like the paper, this uses the Euler
cost for multistep solvers too. The paper measures errors in X = x / alpha. For noise schedules that reach as far as a
cosine one (r = sigma / alpha = 20000), errors near pure noise then dominate: on the built-in teacher with iPNDM over 5
steps, the samples of that path were within 0.141 of those of the fine timesteps, of the path by x within 0.099, and of
even timesteps within 0.151. The best gamma depends on the solver: each path, and the plan's own timesteps, are sampled
from the same noise, and the one with the lowest loss is kept,

    loss = mean over samples of |x_end - x_end(fine timesteps)|

Then `refine` rounds move one timestep at a time to lower the loss. This is the objective of LD3 (Tong et al. 2024),
minimized by a pattern search instead of gradients, since there are only N variables. The search does not use the
feature networks of the evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from diffpress.compress.progress import progress
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.compress.seeds import SEARCH_SEED
from diffpress.runtime.carried_settings import with_solver
from diffpress.runtime.denoiser import Denoise, plan_denoiser
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs, Network
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.parameterization import transfer
from diffpress.runtime.sampler import noise_for, sample
from diffpress.runtime.sampling_plan import SamplingPlan, plan_levels
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import timesteps_for

logger = logging.getLogger(__name__)

GAMMAS = (0.8, 0.9, 1.0, 1.15)  # 1.15 is the value of the paper
FINE_SOLVER = "dpmpp_2m"  # solver over the fine timesteps
INITIAL_MOVE = 0.25  # first move of a timestep, as a fraction of the gap to the next one
MIN_MOVE = 0.5  # in timesteps; refinement stops when all moves are smaller

Timesteps = tuple[float, ...]


def search(
    network: Network, spec: DenoiserSpec, config: ScheduleConfig, conditions: ConditioningInputs
) -> tuple[Timesteps, dict[str, Any]]:
    """Search the timesteps of the spec's plan, keeping its solver and their number.

    Args:
        network: The network to sample.
        spec: Its spec.
        config: Settings of the search.
        conditions: Conditioning of `config.samples` samples.

    Returns:
        The timesteps, and the measured losses and settings for the history.

    Raises:
        InvalidInputError: The samples of the fine timesteps are NaN or infinite.
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
    logger.info(f"search: distance to {config.fine} steps of {FINE_SOLVER}: {shown}")
    if config.refine:
        best, seen[best] = refine_timesteps(
            best, seen[best], loss_of, config.refine, len(spec.schedule) - 1, spec.spacing.integer
        )
        shown["refined"] = round(seen[best], 5)
        logger.info(f"search: refined to {shown['refined']}")
    return best, {"timesteps": list(best), "loss": shown, "samples": config.samples, "fine": list(fine)}


def fine_timesteps(spec: DenoiserSpec, count: int) -> Timesteps:
    """Return about `count` timesteps, starting at the plan's first, descending.

    Half of them are even in t and half in log-SNR, since the best timesteps lie between these two spacings; the plan's
    own timesteps are included.
    """
    first, halves = spec.plan.timesteps[0], (count // 2, count - count // 2)
    kinds = zip(("trailing", "logsnr"), halves, strict=True)
    within = {t for kind, half in kinds for t in timesteps_for(kind, half, spec.schedule) if t < first}
    return tuple(sorted(within | set(spec.plan.timesteps), reverse=True))


def jump_costs(
    network: Network, spec: DenoiserSpec, fine: Timesteps, count: int, batch: int, conditions: ConditioningInputs
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the cost matrix of the fine timesteps and the samples they lead to.

    Returns:
        cost[i, j] over the M fine timesteps and the end, float64 [M + 1, M + 1], and the samples [N, C, H, W].

    Raises:
        InvalidInputError: The samples are NaN or infinite.
    """
    own = spec.plan
    plan = replace(with_solver(spec, FINE_SOLVER).over(fine), start=own.start, end=own.end)
    levels = plan_levels(spec.schedule, fine, plan.end)
    total, ends = np.zeros((len(levels), len(levels))), []
    for part in batches(count, batch, "search: fine timesteps"):
        network_denoise = plan_denoiser(network, spec.with_plan(plan), conditions.part(part))
        visited: list[tuple[np.ndarray, np.ndarray]] = []

        def denoise(
            x: np.ndarray, level: NoiseLevel, network_denoise: Denoise = network_denoise, visited: list[Any] = visited
        ) -> np.ndarray:
            visited.append((x, network_denoise(x, level)))
            return visited[-1][1]

        end = final_samples(denoise, spec, plan, part)
        states = [*(x for x, _ in visited), end]
        for i, (x, x0) in enumerate(visited):
            for j in range(i + 1, len(levels)):
                total[i, j] += _sample_rms(transfer(x, x0, levels[i], levels[j]) - states[j]).sum()
        ends.append(end)
    final = np.concatenate(ends)
    if not np.isfinite(final).all():
        raise InvalidInputError(
            "schedule: the samples over the fine timesteps contain NaN or infinite values; the search cannot run"
        )
    return total / count, final


def best_path(costs: np.ndarray, steps: int, gamma: float) -> tuple[int, ...]:
    """Return the `steps` indices, starting with 0, whose jumps to the end have the lowest total cost."""
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
    """Return the mean RMS distance from `ends` [N, C, H, W] of the samples over these timesteps."""
    plan, total = spec.plan.over(timesteps), 0.0
    for part in batches(len(ends), batch):
        denoise = plan_denoiser(network, spec.with_plan(plan), conditions.part(part))
        total += float(_sample_rms(final_samples(denoise, spec, plan, part) - ends[part]).sum())
    value = total / len(ends)
    return value if np.isfinite(value) else np.inf


def refine_timesteps(
    timesteps: Timesteps,
    value: float,
    loss_of: Callable[[Timesteps], float],
    rounds: int,
    max_timestep: float,
    integral: bool,
) -> tuple[Timesteps, float]:
    """Refine timesteps by a pattern search over `rounds` of moving each in turn.

    The move of a timestep starts as a fraction of the gap to the next one. It is tried in both directions, multiplied
    by 1.5 after a success and by 0.5 after a failure. Timesteps stay between their neighbors and within
    [0, max_timestep].

    Args:
        timesteps: Descending timesteps to start from.
        value: Their loss.
        loss_of: Loss of timesteps.
        rounds: Maximum number of rounds.
        max_timestep: Largest timestep.
        integral: Keep timesteps at integers.

    Returns:
        The refined timesteps and their loss, which is never above `value`.
    """
    best = list(timesteps)
    moves = [INITIAL_MOVE * (t - below) for t, below in zip(best, [*best[1:], 0.0], strict=True)]
    with progress("search: refine", rounds) as advance:
        for done in range(1, rounds + 1):
            for k, old in enumerate(tuple(best)):
                for move in (moves[k], -moves[k]):
                    moved = float(round(old + move)) if integral else old + move
                    above, below = [max_timestep + 1.0, *best][k], [*best, -1.0][k + 1]
                    if moved == old or not below < moved < above or not 0.0 <= moved <= max_timestep:
                        continue
                    candidate = (*best[:k], moved, *best[k + 1 :])
                    found = loss_of(candidate)
                    if found < value:
                        best, value, moves[k] = list(candidate), found, 1.5 * move
                        break
                else:
                    moves[k] = 0.5 * moves[k]
            advance(done, f"{value:.5f}")
            if max(map(abs, moves)) < MIN_MOVE:
                break
    return tuple(best), value


def final_samples(denoise: Denoise, spec: DenoiserSpec, plan: SamplingPlan, part: slice) -> np.ndarray:
    """Return the final samples of one batch of the search's seeds under the plan."""
    seeds = range(SEARCH_SEED, SEARCH_SEED + part.stop)[part]
    (*_, last) = sample(denoise, noise_for(seeds, spec.sample_shape), spec.schedule, plan)
    return last.x


def batches(count: int, batch: int, what: str | None = None) -> Iterator[slice]:
    """Yield the samples of each batch, with progress if `what` names the work."""
    slices = [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
    with progress(what, len(slices)) if what else nullcontext() as advance:
        for done, part in enumerate(slices, 1):
            yield part
            if advance is not None:
                advance(done)


def _sample_rms(difference: np.ndarray) -> np.ndarray:
    """Return the root mean square of each sample [N, ...], float64 [N]."""
    rms: np.ndarray = np.sqrt(np.square(difference.reshape(len(difference), -1), dtype=np.float64).mean(axis=1))
    return rms
