"""compress/distillation/projected_student.py: features projected onto the channels of the teacher's."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import conv2d, conv3d

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.block_features import capture_features, dummy_features, relative_distance
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.distillation.distill import distill
from diffpress.compress.distillation.projected_student import ProjectedStudent, project, projected_student
from diffpress.compress.evaluation.teacher_sqnr import teacher_sqnr_db
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.widths import widths_of
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.losses import add_noise, forward
from diffpress.runtime.errors import InvalidInputError
from tests.against_diffusers import with_short_plan


def config(**settings: Any) -> RecoverConfig:
    shared = {"steps": 6, "batch": 4, "learning_rate": 2e-3, "warmup": 2, "ema": 0.9, "features": "projection"}
    return RecoverConfig(**{**shared, **settings})


def blocks_of(checkpoint: Checkpoint) -> list[str]:
    return adapter_for(checkpoint.model).blocks(checkpoint.model)


def features_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return dummy_features(checkpoint.model, checkpoint.spec, blocks_of(checkpoint))


def pruned_half(checkpoint: Checkpoint, context: Callable[..., Context]) -> Checkpoint:
    return prune(checkpoint, PruneConfig(method="random", ratio=0.5, round_to=1), context(checkpoint))


def test_a_projection_is_a_1x1_convolution_of_images_and_a_linear_layer_of_tokens() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 3)
    image, video, tokens, vector = (torch.randn(2, *shape) for shape in ((3, 4, 4), (3, 2, 4, 4), (6, 3), (3,)))
    for found, expected in (
        (project(image, weight), conv2d(image, weight[:, :, None, None])),
        (project(video, weight), conv3d(video, weight[:, :, None, None, None])),
        (project(tokens, weight), tokens @ weight.T),
        (project(vector, weight), vector @ weight.T),
    ):
        torch.testing.assert_close(found, expected)


# --- initial projections ----------------------------------------------------------------------------------------


class Stem(nn.Module):
    """A network whose block `first` reads the sample itself: pruning changes its channels in number only."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.inner, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.tanh(self.inner(torch.tanh(self.first(sample)))))
        return out


STEMS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(1, 8, 3, padding=1),
    "convolution without bias": lambda: nn.Conv2d(1, 8, 3, padding=1, bias=False),
    "transposed without bias": lambda: nn.ConvTranspose2d(1, 8, 3, padding=1, bias=False),
    "two layers": lambda: nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
}


@pytest.mark.parametrize("stem", STEMS)
def test_projections_start_as_the_channels_that_pruning_kept(
    stem: str, custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    teacher = custom(Stem(STEMS[stem]()))
    once = pruned_half(teacher, context)
    twice = pruned_half(once, context)
    for small, large in ((once, teacher), (twice, once), (twice, teacher)):
        module = projected_student(small, large, ["first"], 0)
        found, ours, theirs = (*module.projections, features_of(small)["first"], features_of(large)["first"])
        assert found.shape == (theirs.shape[1], ours.shape[1]) and theirs.shape[1] > ours.shape[1]
        kept = found.sum(1) > 0
        projected = project(ours, found)
        torch.testing.assert_close(projected[:, kept], theirs[:, kept])
        assert int(kept.sum()) == ours.shape[1] and not projected[:, ~kept].any()


def test_projections_start_as_the_channels_of_the_last_layer(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    teacher = custom(Stem(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.Tanh())))
    small = pruned_half(teacher, context)
    first, last = (small.kept_indices[f"first.{layer}.weight"][0] for layer in (0, 2))
    assert len(first) == len(last) and list(first) != list(last)
    (found,) = projected_student(small, teacher, ["first"], 0).projections
    assert torch.equal(found, torch.eye(8)[:, last])


def test_projections_of_unrecorded_channels_start_orthogonal(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    teacher = custom(Stem(STEMS["convolution"]()))
    small = pruned_half(teacher, context).evolve(kept_indices={})
    first, again, other = (projected_student(small, teacher, ["first"], seed).projections[0] for seed in (0, 0, 1))
    torch.testing.assert_close(first.T @ first, torch.eye(4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_blocks_of_equal_widths_are_compared_channel_by_channel(unet: Checkpoint) -> None:
    module = projected_student(unet, unet, blocks_of(unet), 0)
    inputs = dummy_inputs(unet.spec, 1)
    out, features = module(inputs["sample"], inputs["timestep"], {"class_labels": inputs["class_labels"]})
    assert torch.equal(out, adapter_for(unet.model).forward(unet.model, inputs))
    assert not module.projections and relative_distance(features, features_of(unet)) == 0.0
    turned = {name: feature.flip(1) for name, feature in features.items()}  # has the same energy
    assert relative_distance(turned, features_of(unet)) > 0.1


def test_blocks_at_other_resolutions_are_refused_by_name(custom: Callable[..., Checkpoint]) -> None:
    teacher, student = (custom(Stem(nn.Conv2d(1, 8, 3, padding=padding))) for padding in (1, 0))
    student.model.last = nn.Conv2d(6, 1, 3, padding=2)
    with pytest.raises(InvalidInputError, match=r"block 'first' has energy maps \[1, 6, 6\], the teacher's are"):
        projected_student(student, teacher, ["first"], 0)


# --- training ---------------------------------------------------------------------------------------------------


def test_recovering_brings_the_student_closer_to_its_teacher(
    unet: Checkpoint, pruned: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(unet)
    recovered = distill(pruned, config(steps=40, batch=8, feature_weight=1.0), ctx)
    assert teacher_sqnr_db(recovered, unet, ctx.data) > teacher_sqnr_db(pruned, unet, ctx.data) + 3.0
    assert widths_of(recovered.model) == widths_of(pruned.model)
    assert set(recovered.model.state_dict()) == set(pruned.model.state_dict())


class Tokens(nn.Module):
    """A network of rows as tokens [B, 8, C], whose block returns (context, tokens) like a joint transformer block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.joint, self.last = nn.Linear(8, 16), Joint(), nn.Linear(16, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        _, tokens = self.joint(torch.tanh(self.first(sample[:, 0])))
        return self.last(tokens)[:, None]


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens, tokens + torch.tanh(self.inner(tokens))


def test_features_of_tokens_and_of_joint_blocks_approach_the_teachers(
    custom: Callable[..., Checkpoint], context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = custom(Tokens())
    small, ctx = pruned_half(teacher, context), context(teacher)
    modules: list[ProjectedStudent] = []

    def observed(*arguments: Any) -> ProjectedStudent:
        modules.append(projected_student(*arguments))
        return modules[0]

    monkeypatch.setattr("diffpress.compress.distillation.recover.projected_student", observed)
    trained = distill(small, config(steps=100, batch=16, output_weight=0.0, feature_weight=1.0), ctx)

    assert ctx.data is not None
    x, _ = ctx.data.batch(48, torch.Generator().manual_seed(5))
    t = torch.full((48,), 20)
    with torch.no_grad(), capture_features(teacher.model, blocks_of(teacher)) as references:
        forward(teacher.model, teacher.spec, x, t, {})
    start = projected_student(small, teacher, blocks_of(teacher), 0)
    assert [tuple(weight.shape) for weight in start.projections] == [(16, 8), (16, 8)]
    with torch.no_grad():
        before, after = (relative_distance(module(x, t, {})[1], references) for module in (start, modules[0]))
    assert after < 0.5 * before
    for name, value in modules[0].base.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], value)


@pytest.mark.parametrize("kind", ["sd", "dit", "sd3", "flux"])
def test_a_family_is_trained_with_features_of_all_its_channels(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = with_short_plan(load_checkpoint(tiny_folder(kind)), steps=2)
    narrower = PruneConfig(method="magnitude", ratio=0.25, round_to=4, residual=True)
    small = prune(teacher, narrower, Context(0, tmp_path, teacher))
    assert projected_student(small, teacher, blocks_of(small), 0).projections  # the streams differ in width
    settings = config(steps=1, warmup=1, batch=2, samples=2)
    trained = distill(small, settings, Context(0, tmp_path / "work", teacher, shared=tmp_path))
    states = (trained.model.state_dict(), small.model.state_dict())
    assert set(states[0]) == set(states[1]) and all(value.isfinite().all() for value in states[0].values())
    assert trained.hash != small.hash


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kill_at", [3, 5])
def test_a_killed_recovery_ends_bit_identical_to_an_uninterrupted_one(
    kill_at: int,
    unet: Checkpoint,
    pruned: Checkpoint,
    context: Callable[..., Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctx, settings = context(unet), config(save_every=2, accumulate=2, min_snr_gamma=5.0, precision="bf16")
    uninterrupted = distill(pruned, settings, replace(ctx, work=tmp_path / "other"))
    calls = iter(range(100))

    def killing(*arguments: Any) -> torch.Tensor:
        if next(calls) == 2 * kill_at + 1:
            raise KilledError
        return add_noise(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("diffpress.compress.distillation.recover.add_noise", killing)
        with pytest.raises(KilledError):
            distill(pruned, settings, ctx)
    assert any(ctx.work.iterdir())
    resumed = distill(pruned, settings, ctx)
    assert resumed.hash == uninterrupted.hash != pruned.hash


def test_the_projection_is_trained_and_saved_with_the_training_state(
    unet: Checkpoint, pruned: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(unet)
    before = projected_student(pruned, unet, blocks_of(unet), ctx.seed).projections
    distill(pruned, config(save_every=5), ctx)
    saved = load_file(ctx.work / "training.safetensors")
    assert len(before) > 1
    for i, weight in enumerate(before):
        assert not torch.equal(saved[f"model.projections.{i}"], weight)


def test_a_wrapped_student_has_the_gradients_of_the_student_inside(unet: Checkpoint, pruned: Checkpoint) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inputs = dummy_inputs(unet.spec, 2)
    references = features_of(unet)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        gradients = []
        for wrap in (lambda module: module, nn.parallel.DistributedDataParallel):
            module = projected_student(pruned, unet, blocks_of(unet), 0)
            out, features = wrap(module)(inputs["sample"], inputs["timestep"], {"class_labels": inputs["class_labels"]})
            (out.square().mean() + relative_distance(features, references)).backward()
            gradients.append([parameter.grad for parameter in module.parameters()])
        for one, other in zip(*gradients, strict=True):
            assert one is not None and other is not None
            torch.testing.assert_close(one, other)
    finally:
        torch.distributed.destroy_process_group()


def test_previews_are_samples_of_the_student(
    unet: Checkpoint, pruned: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    distill(pruned, config(steps=2, preview_every=1), replace(context(unet), logs=tmp_path / "logs"))
    assert sorted(path.name for path in (tmp_path / "logs").glob("*.png")) == ["step-000001.png", "step-000002.png"]


def test_a_projection_without_weight_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="features: projection has no effect with feature_weight: 0"):
        config(feature_weight=0.0)
