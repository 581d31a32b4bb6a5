"""compress/dry_run.py and effort.py: estimated work against the evaluations that the stages really make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch.nn.modules.module import register_module_forward_hook

import diffpress as dp
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.dry_run import Estimate, dry_run
from diffpress.compress.effort import NetworkCost, Work, estimated_bytes, estimated_seconds
from diffpress.compress.recipe import Recipe
from diffpress.compress.stages import STAGES, stages_of
from diffpress.runtime.errors import InvalidInputError

TRAINING: dict[str, Any] = {"steps": 10, "batch": 4, "samples": 16}
STAGE_CONFIGS = [
    dp.Prune(batch=4, timesteps=6),
    dp.Prune(method="magnitude", target={"params": 0.7}),
    dp.PruneDepth(remove=("mid_block.resnets.0",)),
    dp.PruneDepth(blocks=1, method="recoverability", search={"steps": 10, "batch": 4, "samples": 16}),
    dp.PruneSparsity(),
    dp.PruneSparsity(method="sparsegpt", samples=4),
    dp.PruneLowRank(ratio=0.7),
    dp.Recover(**TRAINING),
    dp.Recover(accumulate=3, **TRAINING),
    dp.Progressive(start_steps=8, sample_steps=2, **TRAINING),
    dp.Consistency(sample_steps=2, **TRAINING),
    dp.Schedule(solver="ddim", steps=4, search="gits", samples=8, fine=12),
    dp.Quantize(samples=8, batch=4, output_correction=False),
    dp.Quantize(samples=8, batch=4, smoothquant=True),
    dp.Quantize(samples=8, batch=4, qat={"steps": 10, "trajectories": 16}),
    dp.Quantize(samples=8, batch=4, qat={"steps": 5, "accumulate": 2, "trajectories": 16}),
]


@contextmanager
def counted_samples() -> Iterator[dict[str, int]]:
    """Count the samples that pass through a U-Net, with and without gradients."""
    found = {"trained": 0, "evaluations": 0}

    def add(module: object, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, UNet2DModel):
            found["trained" if torch.is_grad_enabled() else "evaluations"] += len(output[0])

    hook = register_module_forward_hook(add)
    try:
        yield found
    finally:
        hook.remove()


def test_a_cut_that_the_model_does_not_have_is_refused_before_the_run(unet: Checkpoint) -> None:
    cache = {"kind": "features", "speedup": 1.5, "cut": "outer_1"}
    (stage,) = stages_of([dp.Schedule(solver="ddim", steps=8, cache=cache)])
    with pytest.raises(InvalidInputError, match="cut 'outer_1' is not one of up_blocks"):
        STAGES[stage.name].estimate(Estimate(unet, None), stage.config, 0)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("config", STAGE_CONFIGS, ids=repr)
def test_the_estimated_evaluations_are_about_those_of_the_stage(
    config: Any, guided: bool, unet: Checkpoint, tmp_path: Path
) -> None:
    conditioning = replace(unet.spec.conditioning, null_label=3)
    plan = replace(unet.spec.plan, guidance=2.0 if guided else 1.0)
    teacher = unet.evolve(spec=replace(unet.spec, conditioning=conditioning, plan=plan))
    (stage,) = stages_of([config])
    if stage.name == "schedule" or not isinstance(config, dp.Recover):
        checkpoint = teacher
    else:
        checkpoint = teacher.evolve(history=())
    with counted_samples() as found:
        STAGES[stage.name].run(checkpoint, stage.config, Context(0, tmp_path / "work", teacher, shared=tmp_path))
    work = STAGES[stage.name].work(stage.config, teacher, None)
    assert work is not None
    # torch-pruning evaluates the network with gradients, though nothing is trained
    assert found["trained"] == pytest.approx(work.trained, rel=0.2, abs=0 if work.trained else 20)
    assert found["evaluations"] == pytest.approx(work.evaluations, rel=0.5, abs=2)


def test_time_and_memory_follow_from_the_work() -> None:
    cost = NetworkCost(seconds=0.5, kept_bytes=1000, largest_bytes=100)
    assert estimated_seconds(Work(evaluations=10, trained=4), cost) == 0.5 * (10 + 3 * 4)
    assert estimated_bytes(Work(batch=2, copies=3), cost, weights=50) == 3 * 50 + 2 * 4 * 100
    assert estimated_bytes(Work(trained=1, batch=2, copies=6), cost, weights=50) == 6 * 50 + 2 * 1000


def test_a_dry_run_counts_later_stages_under_the_plan_of_earlier_ones(unet: Checkpoint) -> None:
    many = dry_run(unet, Recipe.of([dp.Quantize(samples=8)]))
    few = dry_run(unet, Recipe.of([dp.Schedule(steps=2), dp.Quantize(samples=8)]))
    assert [entry["name"] for entry in few["stages"]] == ["schedule", "quantize"]
    assert all(entry["seconds"] >= 0 and entry["peak_mib"] >= 0 for entry in few["stages"])
    work = STAGES["quantize"].work
    one, two = (work(dp.Quantize(samples=8), unet.evolve(spec=unet.spec.with_plan(plan)), 0) for plan in _plans(unet))
    assert one is not None and two is not None and one.evaluations == 2 * two.evaluations
    assert many["stages"][0]["seconds"] > 0


@pytest.mark.parametrize("method", ["ablation", "recoverability"])
def test_sizes_that_a_choice_of_blocks_or_an_engine_decides_stay_unknown(method: Any, unet: Checkpoint) -> None:
    prunes = [dp.PruneDepth(blocks=2, method=method), dp.Prune(method="magnitude", ratio=0.3, round_to=4)]
    assert [entry["after"] for entry in dry_run(unet, Recipe.of(prunes))["stages"]] == [None, None]
    ranks = [
        dp.PruneLowRank(ratio=0.7, engine="openvino"),
        dp.PruneDepth(remove=("mid_block.resnets.0",)),
        dp.Quantize(),
    ]
    assert [entry["after"] for entry in dry_run(unet, Recipe.of(ranks))["stages"]] == [None, None, None]
    named = [dp.PruneDepth(remove=("mid_block.resnets.0",)), *prunes[1:]]
    sizes = [entry["after"]["parameters"] for entry in dry_run(unet, Recipe.of(named))["stages"]]
    assert sizes[0] > sizes[1]


def test_a_dry_run_refuses_what_pruning_will_refuse(unet: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match="blocks = 99, but only"):
        dry_run(unet, Recipe.of([dp.PruneDepth(blocks=99)]))
    with pytest.raises(InvalidInputError, match="prune: no layer has fewer MACs with low rank"):
        dry_run(unet, Recipe.of([dp.PruneLowRank(ratio=0.01)]))
    with pytest.raises(InvalidInputError, match="gptq changes the weights that are zero"):
        dry_run(unet, Recipe.of([dp.PruneSparsity(), dp.Quantize(gptq={"samples": 2})]))


def _plans(checkpoint: Checkpoint) -> tuple[Any, Any]:
    plan = checkpoint.spec.plan
    return plan, plan.over(plan.timesteps[::2])
