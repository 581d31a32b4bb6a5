"""What a recipe costs: network evaluations of every stage, and from them time and memory on this machine.

    seconds   (evaluations + TRAINED trained) * seconds of one evaluation of one sample, measured here
    memory    copies * weights in fp32 + activations, the outputs of all layers for the samples of one batch if they are
              kept for gradients, else the largest ACTIVE of them

Both are estimates: what else a stage does (solving for scales, saving) is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.distillation.config import (
    DistillConfig,
    GuidanceConfig,
    ProgressiveConfig,
    TrajectoryConfig,
)
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.components import DECODER
from diffpress.compress.models.counts import is_large
from diffpress.compress.pruning.config import PruneConfig, PruneDepthConfig, PruneLowRankConfig, PruneSparsityConfig
from diffpress.compress.pruning.importance import needs_gradients
from diffpress.compress.pruning.recoverability import NETWORKS
from diffpress.compress.pruning.target import BISECTIONS
from diffpress.compress.pruning.visited_states import STATES
from diffpress.compress.quantization.algorithms.output_correction import corrects_output
from diffpress.compress.quantization.components import COMPARED_IMAGES, component_formats
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.compress.sampling_schedule.step_patterns import MAX_GAP
from diffpress.runtime.guidance import evaluations_per_step
from diffpress.runtime.sampler import network_evaluations
from diffpress.runtime.spec import DenoiserSpec

TRAINED = 3.0  # forward, and a backward pass of twice its products
PASSES = TRAINED + 1.0  # of a step that distills: the teacher's evaluation as well
ACTIVE = 4  # tensors that are alive at the same time without gradients
TRIAL = 5  # samples that a network pruned by one ratio is evaluated on
CACHE_CANDIDATES = 14  # plans that a step cache compares before it is refined, at most
BATCH, ROUNDS = 4, 3


class Work(NamedTuple):
    """Network evaluations of a stage, counted in samples, and what it holds at the same time.

    Attributes:
        evaluations: Without gradients.
        trained: With gradients.
        batch: Samples of one evaluation.
        copies: Copies of the weights in fp32: networks, gradients, optimizer states, averages.
    """

    evaluations: float = 0.0
    trained: float = 0.0
    batch: int = 1
    copies: int = 2


class NetworkCost(NamedTuple):
    """Cost of one evaluation of one sample: seconds here, and bytes of all layers' outputs and of the largest."""

    seconds: float
    kept_bytes: int
    largest_bytes: int


def measure_cost(checkpoint: Checkpoint) -> NetworkCost:
    """Time the network on this machine and sum its layers' outputs; a large model is evaluated once."""
    model, spec = checkpoint.model.eval(), checkpoint.spec
    batch, rounds = (1, 1) if is_large(model) else (BATCH, ROUNDS)
    inputs, forward, times = dummy_inputs(spec, batch), adapter_for(model).forward, []
    with torch.no_grad(), _output_bytes(model) as sizes:
        for _ in range(rounds):
            sizes.clear()
            start = time.perf_counter()
            forward(model, inputs)
            times.append((time.perf_counter() - start) / batch)
    return NetworkCost(statistics.median(times), sum(sizes) // batch, max(sizes, default=0) // batch)


def estimated_seconds(work: Work, cost: NetworkCost) -> float:
    """Return the seconds of a stage's network evaluations."""
    return (work.evaluations + TRAINED * work.trained) * cost.seconds


def estimated_bytes(work: Work, cost: NetworkCost, weights: int) -> int:
    """Return the memory of a stage at its peak; `weights` are the bytes of one copy in fp32."""
    active = cost.kept_bytes if work.trained else ACTIVE * cost.largest_bytes
    return work.copies * weights + work.batch * active


def work_of_width(config: PruneConfig, checkpoint: Checkpoint, teacher_samples: int | None) -> Work:
    """Trials of the pruned network, and gradients at some timesteps for the criteria that need them."""
    trials = TRIAL * (1 if config.target is None else 1 + BISECTIONS)
    if not needs_gradients(config):
        return Work(trials)
    return Work(
        trials + _teacher_data(checkpoint.spec, teacher_samples, config.batch),
        config.batch * config.timesteps,
        config.batch,
        copies=3,
    )


def work_of_depth(config: PruneDepthConfig, checkpoint: Checkpoint, teacher_samples: int | None) -> Work | None:
    """The training of recoverability; None of an ablation: how often it evaluates depends on what it finds."""
    if config.search is not None:
        images = config.search.steps * config.search.batch
        evaluations = images + _teacher_data(checkpoint.spec, teacher_samples, config.search.samples)
        # the weights, the updated ones, their gradients, and a copy on the device
        return Work(evaluations, NETWORKS * images, NETWORKS * config.search.batch, copies=4)
    return Work() if config.remove or config.preset else None


def work_of_sparsity(config: PruneSparsityConfig, checkpoint: Checkpoint, teacher_samples: int | None) -> Work:
    """The trajectories of sparsegpt and its evaluations of their states; magnitude reads the weights only."""
    sampled = config.samples * network_evaluations(checkpoint.spec)
    return Work(sampled + STATES * config.samples if config.method == "sparsegpt" else 0.0)


def work_of_low_rank(config: PruneLowRankConfig, checkpoint: Checkpoint, teacher_samples: int | None) -> Work:
    """The network with all layers replaced, which an engine times."""
    return Work(TRIAL)


def work_of_distill(config: DistillConfig, checkpoint: Checkpoint, teacher_samples: int | None) -> Work:
    """The student's training, the teacher's targets, and the samples it learns from."""
    spec = checkpoint.spec
    each, guided = config.steps * config.accumulate * config.batch, evaluations_per_step(spec)
    trained, evaluations = each, each + _teacher_data(spec, teacher_samples, config.samples)
    if isinstance(config, GuidanceConfig):
        evaluations += each
    elif isinstance(config, ProgressiveConfig):
        phases = (config.start_steps // config.sample_steps).bit_length() - 1 + (spec.prediction == "epsilon")
        trained, evaluations = phases * each, evaluations - each + 2 * each * (guided + phases - 1)
    elif isinstance(config, TrajectoryConfig):
        evaluations = each + config.trajectories * config.trajectory_steps * guided
    return Work(evaluations, trained, config.batch, copies=6)


def work_of_schedule(config: ScheduleConfig, checkpoint: Checkpoint, teacher_samples: int | None) -> Work:
    """The fine trajectories of a search and the jumps between their states; the patterns that a step cache compares."""
    each, evaluations, batch = evaluations_per_step(checkpoint.spec), 0, 1
    steps = config.steps if config.timesteps is None else len(config.timesteps)
    if config.search is not None:
        evaluations, batch = config.samples * config.fine * (1 + each), config.batch
    if config.cache is not None:
        compared = CACHE_CANDIDATES + config.cache.refine * steps
        compared += MAX_GAP if config.cache.kind != "forecast" else 0
        evaluations += config.cache.samples * steps * each * compared
        batch = max(batch, config.cache.batch)
    return Work(evaluations, 0.0, batch, copies=1)


def work_of_quantize(config: QuantizeConfig, checkpoint: Checkpoint, teacher_samples: int | None) -> Work:
    """Trajectories for calibration and for the methods that evaluate them again, corrections, and QAT."""
    spec = checkpoint.spec
    one = config.samples * network_evaluations(spec)
    encoders = sum(name != DECODER for name in component_formats(checkpoint, config))
    sampled = 2 * COMPARED_IMAGES * encoders * network_evaluations(spec)
    again = sum(map(bool, (config.smoothquant, config.split_concats, config.awq, config.gptq)))
    if config.qat is None:
        corrected = 5 * one if corrects_output(config, checkpoint.model) else 0  # fitted, and compared on other noise
        return Work(one * (1 + again) + corrected + sampled, 0.0, config.batch)
    recorded = config.qat.trajectories * (network_evaluations(spec) + spec.plan.steps)
    trained = config.qat.steps * config.qat.accumulate * config.batch
    return Work(one * again + recorded + sampled, trained, config.batch, copies=6)


def _teacher_data(spec: DenoiserSpec, teacher_samples: int | None, own: int) -> float:
    return (own if teacher_samples is None else teacher_samples) * network_evaluations(spec)


@contextmanager
def _output_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Record the bytes of every leaf module's output while the model runs."""
    sizes: list[int] = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(4 * output.numel())

    hooks = [m.register_forward_hook(record) for m in model.modules() if not any(True for _ in m.children())]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()
