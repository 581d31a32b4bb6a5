"""Recoverability: gates are exact at 0 and 1, their cost is met, and what training can make up for is removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import diffpress as dp
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.counts import count
from diffpress.compress.models.removable_blocks import without_block
from diffpress.compress.models.removed_blocks import remove_blocks_, removed_blocks
from diffpress.compress.pruning.config import PruneDepthConfig
from diffpress.compress.pruning.depth import removable_blocks
from diffpress.compress.pruning.gated_blocks import gated, keep_probabilities, sampled_gates
from diffpress.compress.pruning.prune import prune
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.stages import STAGES
from diffpress.compress.training.losses import Tensors
from diffpress.compress.training.sample_data import SampleData
from diffpress.compress.training.teacher_data import TeacherData
from diffpress.runtime.errors import InvalidInputError
from tests.against_diffusers import with_short_plan

Contexts = Callable[..., Context]
KINDS = ("ldm", "sd", "sdxl", "dit", "pixart-alpha", "sd3", "flux")


class Straight(nn.Module):
    """A linear branch: a layer before or after it can take over what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class Waves(nn.Module):
    """A branch that is far from linear, added by the block itself or by its caller."""

    def __init__(self, scale: float = 0.25, adds: bool = True) -> None:
        super().__init__()
        self.conv, self.scale, self.adds = nn.Conv2d(8, 8, 1, bias=False), scale, adds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.scale * torch.cos(4.0 * self.conv(x))
        return x + branch if self.adds else branch


class Blocks(nn.Module):
    """Blocks between two convolutions, which add their input themselves unless the caller `adds`."""

    def __init__(self, *blocks: nn.Module, adds: bool = False) -> None:
        super().__init__()
        self.adds = adds
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.first(sample)
        for block in self.blocks:
            x = x + block(x) if self.adds else block(x)
        return self.last(x)


def two_blocks() -> nn.Module:
    torch.manual_seed(0)
    network = Blocks()
    network.blocks.extend([Straight(), Waves()])
    return network


def searched(**search: Any) -> PruneDepthConfig:
    return PruneDepthConfig(blocks=1, method="recoverability", search=search)


def output(model: nn.Module, inputs: Tensors) -> torch.Tensor:
    with torch.no_grad():
        return adapter_for(model).forward(model, inputs)


# --- gates -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[*KINDS, "unet", "adds", "caller adds"])
def gateable(
    request: Any, tiny_folder: Callable[..., Path], unet: Checkpoint, custom: Callable[..., Checkpoint]
) -> Checkpoint:
    torch.manual_seed(3)
    if request.param == "unet":
        return unet
    if request.param not in KINDS:
        caller = request.param == "caller adds"
        return custom(Blocks(*(Waves(0.1, adds=not caller) for _ in range(3)), adds=caller))
    return with_short_plan(load_checkpoint(tiny_folder(request.param)), 2)


def test_gates_of_one_change_no_bit_and_those_of_zero_are_the_network_without_the_blocks(gateable: Checkpoint) -> None:
    model, inputs = gateable.model.eval(), dummy_inputs(gateable.spec, 2)
    blocks = removable_blocks(gateable)
    whole = output(model, inputs)
    with gated(model, blocks, torch.ones(len(blocks))):
        assert torch.equal(output(model, inputs), whole)
    for index, block in enumerate(blocks):
        gates = torch.ones(len(blocks))
        gates[index] = 0.0
        with gated(model, blocks, gates):
            found = output(model, inputs)
        with without_block(model, block):
            assert torch.equal(found, output(model, inputs)), block
        assert not torch.equal(found, whole), block
    smallest = gateable.shared_model().eval()
    remove_blocks_(smallest, blocks)
    with gated(model, blocks, torch.zeros(len(blocks))):
        assert torch.equal(output(model, inputs), output(smallest, inputs))
    assert torch.equal(output(model, inputs), whole)


def test_a_gate_is_linear_between_its_ends(custom: Callable[..., Checkpoint]) -> None:
    checkpoint = custom(two_blocks())
    block, inputs = removable_blocks(checkpoint)[1], dummy_inputs(checkpoint.spec, 2)
    outputs = []
    for gate in (0.0, 0.25, 1.0):
        with gated(checkpoint.model, [block], torch.tensor([gate])):
            outputs.append(output(checkpoint.model, inputs))
    torch.testing.assert_close(outputs[1], 0.75 * outputs[0] + 0.25 * outputs[2])


SAVED = torch.tensor([0.3, 0.1, 0.05, 0.2, 0.15], dtype=torch.float64)
LOGITS = torch.tensor([1.0, -0.5, 0.2, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("to_save", [0.01, 0.3, 0.79])
def test_the_probabilities_meet_the_cost_and_so_do_their_derivatives(to_save: float) -> None:
    kept = keep_probabilities(LOGITS, SAVED, to_save)
    assert (SAVED * (1 - kept)).sum().item() == pytest.approx(to_save, abs=1e-9)
    assert kept.argsort().tolist() == LOGITS.argsort().tolist()
    jacobian = torch.autograd.functional.jacobian(lambda logits: keep_probabilities(logits, SAVED, to_save), LOGITS)
    step, columns = 1e-5, []
    for direction in torch.eye(len(LOGITS), dtype=torch.float64):
        up, down = (keep_probabilities(LOGITS + sign * step * direction, SAVED, to_save) for sign in (1, -1))
        columns.append((up - down) / (2 * step))
    torch.testing.assert_close(jacobian, torch.stack(columns, 1), rtol=1e-4, atol=1e-7)


def test_every_sampled_network_just_meets_the_cost() -> None:
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(5, dtype=torch.float64)
    for _ in range(200):
        uniform = torch.rand(5, generator=generator, dtype=torch.float64)
        gates = sampled_gates(LOGITS, SAVED, 0.4, uniform, 0.5)
        assert set(gates.tolist()) <= {0.0, 1.0}
        noisy, saved = LOGITS + torch.log(uniform / (1 - uniform)), 0.0
        expected = torch.ones(5, dtype=torch.float64)
        for index in noisy.argsort().tolist():
            if saved < 0.4 - 1e-9:
                expected[index], saved = 0.0, saved + SAVED[index].item()
        assert torch.equal(gates, expected)
        counts += gates
    assert counts[4] == counts.max()


def test_the_gradient_of_a_gate_compares_gains_per_saved_cost() -> None:
    logits = torch.zeros(2, requires_grad=True)
    uniform = torch.full((2,), 0.5)
    for gains, sign in (((2.1, 1.0), 1), ((1.9, 1.0), -1)):  # the first block costs twice as much
        (gradient,) = torch.autograd.grad(
            -(torch.tensor(gains) * sampled_gates(logits, torch.tensor([2.0, 1.0]), 1.5, uniform, 1.0)).sum(), logits
        )
        assert gradient[0].sign() == -sign and gradient[1].sign() == sign


# --- choice ----------------------------------------------------------------------------------------------------


def error_after_training(checkpoint: Checkpoint, data: SampleData, name: str, steps: int) -> float:
    """Train all weights of the network without a block on the other's outputs; return the error."""
    model = checkpoint.clone_model()
    remove_blocks_(model, [block for block in removable_blocks(checkpoint) if block.name == name])
    optimizer, generator = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    error = torch.zeros(())
    for _ in range(steps):
        inputs: Tensors = dummy_inputs(checkpoint.spec, 32, seed=int(torch.randint(0, 10**6, (), generator=generator)))
        error = mse_loss(model(**inputs), output(checkpoint.model, inputs))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return error.item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_training_can_make_up_for_is_removed_though_its_error_is_larger_now(
    seed: int, custom: Callable[..., Checkpoint], context: Contexts, images: SampleData
) -> None:
    checkpoint = custom(two_blocks())
    now, later = (
        {name: error_after_training(checkpoint, images, name, steps) for name in ("blocks.0", "blocks.1")}
        for steps in (1, 200)
    )
    assert now["blocks.0"] > now["blocks.1"] and later["blocks.0"] < 0.2 * later["blocks.1"]
    ctx = context(checkpoint, seed=seed)
    small = prune(checkpoint, searched(steps=100, batch=16, learning_rate=5e-3), ctx)
    assert removed_blocks(small.model) == {"blocks.0": "first"}
    kept = ctx.notes["keep_probabilities"]
    assert kept["blocks.0"] < 0.45 and sum(kept.values()) == pytest.approx(1.0, abs=1e-3)
    ablated = prune(checkpoint, PruneDepthConfig(blocks=1), context(checkpoint))
    assert removed_blocks(ablated.model) == {"blocks.1": "first"}


def test_blocks_whose_branches_are_zero_are_removed(custom: Callable[..., Checkpoint], context: Contexts) -> None:
    torch.manual_seed(0)
    checkpoint = custom(Blocks(Waves(1.0), Waves(0.0), Waves(1.0), Waves(0.0)))
    config = PruneDepthConfig(blocks=2, method="recoverability", search={"steps": 60, "batch": 8})
    ctx = context(checkpoint)
    small = prune(checkpoint, config, ctx)
    assert set(removed_blocks(small.model)) == {"blocks.1", "blocks.3"}, ctx.notes
    inputs = dummy_inputs(checkpoint.spec, 2)
    assert torch.equal(output(small.model, inputs), output(checkpoint.model, inputs))


def test_the_result_is_that_of_removing_the_same_names(unet: Checkpoint, context: Contexts) -> None:
    before, ctx = unet.hash, context(unet)
    search = {"steps": 3, "batch": 2}
    small = prune(unet, PruneDepthConfig(target={"macs": 0.7}, method="recoverability", search=search), ctx)
    names = ctx.notes["removed_blocks"]
    assert set(names) == set(removed_blocks(small.model)) and len(names) > 1
    assert prune(unet, PruneDepthConfig(remove=names), context(unet)).hash == small.hash
    assert Checkpoint(unet.model, unet.spec, unet.source).hash == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*unet.model.modules(), *small.model.modules()))
    # the target is reached, and no block could stay
    blocks, whole = removable_blocks(unet), count(unet.model, unet.spec).macs
    assert count(small.model, unet.spec).macs <= 0.7 * whole
    for kept in names:
        other = unet.clone_model()
        remove_blocks_(other, [block for block in blocks if block.name in names and block.name != kept])
        assert count(other, unet.spec).macs > 0.7 * whole
    kept_probabilities = ctx.notes["keep_probabilities"]
    assert list(kept_probabilities) == [block.name for block in blocks]
    assert [kept_probabilities[name] for name in names] == sorted(kept_probabilities[name] for name in names)


def test_a_text_model_searches_on_samples_of_its_teacher_in_bf16(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = with_short_plan(load_checkpoint(tiny_folder("sd")), 2)
    ctx = Context(0, tmp_path, teacher, TeacherData(teacher, 2, tmp_path, ("a cat",)))
    small = prune(teacher, searched(steps=3, batch=2, precision="bf16"), ctx)
    assert len(removed_blocks(small.model)) == 1


@pytest.mark.parametrize("kind", ["dit", "sd3", "flux"])
def test_transformers_search_on_samples_of_their_own(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = with_short_plan(load_checkpoint(tiny_folder(kind)), 2)
    small = prune(teacher, searched(steps=3, batch=2, samples=2), Context(0, tmp_path, teacher))
    assert len(removed_blocks(small.model)) == 1


# --- runs ------------------------------------------------------------------------------------------------------


def probabilities(checkpoint: Checkpoint, config: PruneDepthConfig, ctx: Context) -> dict[str, float]:
    prune(checkpoint, config, ctx)
    return ctx.notes["keep_probabilities"]


def test_a_search_repeats_bit_for_bit_and_depends_on_the_seed(
    custom: Callable[..., Checkpoint], context: Contexts, tmp_path: Path
) -> None:
    checkpoint, config = custom(two_blocks()), searched(steps=10, batch=4)
    first, again, other = (
        probabilities(checkpoint, config, replace(context(checkpoint, seed), work=tmp_path / str(i)))
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


def test_an_interrupted_search_resumes_to_the_same_choice(
    custom: Callable[..., Checkpoint], context: Contexts, tmp_path: Path
) -> None:
    class Interrupted(SampleData):
        """Data that end after eight batches."""

        def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, Tensors]:
            drawn.append(size)
            if len(drawn) == 9:
                raise KeyboardInterrupt
            return super().batch(size, generator)

    drawn: list[int] = []
    checkpoint, config = custom(two_blocks()), searched(steps=12, batch=4, save_every=3)
    ctx = context(checkpoint)
    data: Any = ctx.data
    expected = probabilities(checkpoint, config, replace(ctx, work=tmp_path / "whole", notes={}))
    interrupted = replace(ctx, data=Interrupted(data.x, data.labels, data.hash, data.spec))
    with pytest.raises(KeyboardInterrupt):
        prune(checkpoint, config, interrupted)
    assert probabilities(checkpoint, config, interrupted) == expected
    assert len(drawn) == 9 + 12 - 6  # from the save after six steps


def test_a_block_that_changes_its_input_in_place_is_refused(
    custom: Callable[..., Checkpoint], context: Contexts
) -> None:
    inner = [nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)) for _ in range(2)]
    checkpoint = custom(Blocks(*inner))
    with pytest.raises(InvalidInputError, match=r"'blocks\.0' changes its input in place .*use method ablation"):
        prune(checkpoint, searched(steps=3), context(checkpoint))


def test_impossible_goals_are_refused_before_the_search(unet: Checkpoint, context: Contexts) -> None:
    settings: dict[str, Any] = {"method": "recoverability", "search": {"steps": 10**9}}
    with pytest.raises(InvalidInputError, match="blocks = 99, but only"):
        prune(unet, PruneDepthConfig(blocks=99, **settings), context(unet))
    with pytest.raises(InvalidInputError, match=r"target macs 0\.01 cannot be reached: at least"):
        prune(unet, PruneDepthConfig(target={"macs": 0.01}, **settings), context(unet))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"blocks": 1, "search": {"rank": 4}}, "search belongs to method recoverability, not ablation"),
        ({"blocks": 1, "method": "recoverability", "samples": 4}, "samples belongs to method ablation"),
        ({"remove": ("a",), "method": "recoverability"}, "recoverability chooses the blocks, but remove already names"),
        ({"preset": "bk_sdm_base", "method": "recoverability"}, "chooses the blocks, but preset already names them"),
        ({"blocks": 1, "method": "gates"}, "'ablation' or 'recoverability', found 'gates'"),
        ({"blocks": 1, "method": "recoverability", "search": {"rank": 0}}, r"search.rank: .*found 0"),
        ({"blocks": 1, "method": "recoverability", "search": {"ranks": 1}}, "did you mean 'rank'"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        PruneDepthConfig(**settings)


def test_only_recoverability_trains() -> None:
    trains = STAGES["prune"].trains
    assert trains(dp.PruneDepth(blocks=1, method="recoverability"))
    assert not trains(dp.PruneDepth(blocks=1)) and not trains(dp.Prune())
    config = dp.PruneDepth(blocks=1, method="recoverability")
    assert config.search is not None and dp.PruneDepth(**config.model_dump()) == config


def test_latencies_that_differ_between_processes_are_refused(unet: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpress.compress.training.distributed.count", lambda: 2)
    check, target = STAGES["prune"].check, {"latency": 0.7}
    with pytest.raises(InvalidInputError, match=r"r\.yaml: prune: method recoverability with a target of latency"):
        check(dp.PruneDepth(target=target, method="recoverability"), unet.spec, True, "r.yaml")
    check(dp.PruneDepth(target=target), unet.spec, True, "r.yaml")
