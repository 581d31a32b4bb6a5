"""Each kind of distillation on an exact denoiser, whose students can be exact, and on a small U-Net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.distill import KINDS, distill
from diffpress.compress.distillation.few_steps import few_timesteps
from diffpress.compress.distillation.progressive import v_objective
from diffpress.compress.distillation.student import train_student
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.training.loop import Objective, Training, train
from diffpress.runtime.denoiser import make_predictor
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import class_conditioning
from diffpress.runtime.noise_schedule import noise_level_at
from diffpress.runtime.sampler import generate

FEW = ["progressive", "trajectory", "consistency", "score"]


def config(kind: str, **settings: Any) -> Any:
    own: dict[str, dict[str, Any]] = {
        "progressive": {"start_steps": 4, "sample_steps": 2},
        "trajectory": {"sample_steps": 2, "trajectories": 32, "trajectory_steps": 4},
        "consistency": {"sample_steps": 2, "stages": 2},
        "score": {"sample_steps": 2, "score_steps": 1},
    }
    shared = {"steps": 3, "batch": 4, "learning_rate": 1e-3, "warmup": 1, "ema": 0.5, "samples": 16}
    return KINDS[kind].config(**{**shared, **own.get(kind, {}), **settings})


def images_of(checkpoint: Checkpoint, count: int = 6) -> np.ndarray:
    labels = np.arange(count) % 3 if checkpoint.spec.conditioning.kind == "class" else None
    return generate(TorchNetwork(checkpoint.model, checkpoint.spec), checkpoint.spec, range(count), labels)


def image_of(checkpoint: Checkpoint) -> torch.Tensor:
    """Return the image that a checkpoint of `one_image` generates."""
    model: Any = checkpoint.model
    return model.image.detach()


# progressive distillation turns epsilon predictions into v predictions, which this module cannot learn
PERFECT = [(kind, p) for kind in FEW for p in ("epsilon", "v", "flow") if (kind, p) != ("progressive", "epsilon")]


@pytest.mark.parametrize(("kind", "prediction"), PERFECT)
def test_an_exact_student_stays_exact_and_samples_in_few_steps(
    kind: str, prediction: str, one_image: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    teacher = one_image(prediction)
    ctx = Context(0, tmp_path / "stages" / ".work", teacher)
    student = distill(teacher, config(kind), ctx)
    assert student.spec.plan.steps == 2 and student.spec.prediction == prediction
    expected = image_of(teacher).numpy()[0]
    tolerance = 0.02 if kind == "score" else 1e-3  # the critic is not exact after its first step
    np.testing.assert_allclose(image_of(student).numpy()[0], expected, atol=tolerance)
    for image in images_of(student):
        np.testing.assert_allclose(image, expected, atol=tolerance)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_one_student_learns_several_numbers_of_steps(
    prediction: str, one_image: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    teacher = one_image(prediction)
    ctx = Context(0, tmp_path / "stages" / ".work", teacher)
    student = distill(teacher, config("trajectory", other_steps=(4, 1), steps=12), ctx)
    plans = [student.spec.plan.timesteps, *student.spec.distilled_timesteps]
    assert [len(timesteps) for timesteps in plans] == [2, 4, 1]
    assert len({t for timesteps in plans for t in timesteps}) == 7, "the timestep must identify the plan"
    expected = image_of(teacher).numpy()[0]
    for timesteps in student.spec.distilled_timesteps:
        for image in images_of(student.evolve(spec=student.spec.with_plan(student.spec.plan.over(timesteps)))):
            np.testing.assert_allclose(image, expected, atol=1e-3)


def test_other_steps_reduce_the_error_in_those_numbers_of_steps(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(unet, data=False)
    targets = images_of(unet)

    def error_in_four(**settings: Any) -> float:
        found = distill(unet, config("trajectory", steps=80, batch=8, trajectories=64, ema=0.9, **settings), ctx)
        four, *_ = found.spec.distilled_timesteps or [few_timesteps(4, found.spec.schedule)]
        images = images_of(found.evolve(spec=found.spec.with_plan(found.spec.plan.over(four))))
        return float(np.abs(images - targets).mean())

    assert error_in_four(sample_steps=1, other_steps=(4,)) < 0.9 * error_in_four(sample_steps=1)


def test_a_consistency_student_accepts_one_and_two_steps(unet: Checkpoint, context: Callable[..., Context]) -> None:
    for own, others in ((1, [2]), (2, [1]), (4, [1, 2])):
        spec = distill(unet, config("consistency", sample_steps=own, steps=1), context(unet)).spec
        assert spec.plan.steps == own and [len(timesteps) for timesteps in spec.distilled_timesteps] == others


@pytest.mark.parametrize("kind", FEW)
def test_a_student_of_another_image_learns_the_image_of_its_teacher(
    kind: str, one_image: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    teacher = one_image("v")
    student = one_image("v", image=torch.zeros(1, 1, 8, 8))
    # generator and critic oscillate unless the critic learns faster
    adversarial = {"steps": 600, "learning_rate": 0.02, "sample_steps": 1, "score_steps": 4} if kind == "score" else {}
    settings = config(kind, **{"steps": 60, "learning_rate": 0.05, "ema": 0.8, **adversarial})
    found = distill(student, settings, Context(0, tmp_path / "stages" / ".work", teacher))
    targets = image_of(teacher)
    before, after = ((image_of(c) - targets).abs().mean().item() for c in (student, found))
    assert after < 0.25 * before
    assert image_of(student).abs().sum() == 0.0  # the input checkpoint is unchanged


@pytest.mark.parametrize("kind", FEW)
def test_a_pruned_student_of_a_class_conditional_model_trains_saves_and_reloads(
    kind: str,
    unet: Checkpoint,
    pruned: Checkpoint,
    context: Callable[..., Context],
    reopened: Callable[..., Checkpoint],
) -> None:
    ctx = context(unet)
    student = distill(pruned, config(kind), ctx)
    assert student.spec.plan.steps == 2 and student.spec.plan.guidance == 1.0 and student.hash != pruned.hash
    save_checkpoint(student, ctx.work.parent / "saved")
    reloaded = reopened(str(ctx.work.parent / "saved"))
    assert reloaded.spec == student.spec
    np.testing.assert_array_equal(images_of(reloaded), images_of(student))


@pytest.mark.parametrize("kind", FEW)
def test_without_images_training_data_is_generated_by_the_teacher(
    kind: str, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(unet, data=False)
    assert distill(unet, config(kind), ctx).hash != unet.hash
    files = list(ctx.samples.glob("paths-*.npy"))
    assert len(files) == (0 if kind == "score" else 1)  # score needs no images


@pytest.mark.parametrize("kind", FEW)
def test_the_same_seed_gives_the_same_student(kind: str, unet: Checkpoint, context: Callable[..., Context]) -> None:
    hashes = [distill(unet, config(kind), context(unet, seed=seed)).hash for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_progressive_turns_an_epsilon_network_into_a_v_network(
    plain: Checkpoint, context: Callable[..., Context], reopened: Callable[..., Checkpoint]
) -> None:
    ctx = context(plain)
    student = distill(plain, config("progressive"), ctx)
    save_checkpoint(student, ctx.work.parent / "saved")
    reloaded = reopened(str(ctx.work.parent / "saved"))
    assert (plain.spec.prediction, student.spec.prediction, reloaded.spec.prediction) == ("epsilon", "v", "v")


def test_an_epsilon_network_learns_the_v_of_its_own_predictions(
    plain: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(plain)
    start = plain.evolve(spec=replace(plain.spec, prediction="v"))
    assert ctx.data is not None
    loss = v_objective(plain.model, plain.spec, ctx.data, 8)
    settings = config("progressive", steps=150, batch=8, learning_rate=5e-3, ema=0.9)
    student = start.evolve(model=train_student(start, loss, settings, ctx))
    level = noise_level_at(plain.spec.schedule, 50)
    x0, _ = ctx.data.batch(16, torch.Generator().manual_seed(9))
    noise = np.random.default_rng(0).standard_normal(x0.shape, dtype=np.float32)
    x = np.float32(level.alpha) * x0.numpy() + np.float32(level.sigma) * noise
    eps, v = (make_predictor(TorchNetwork(c.model, c.spec), c.spec)(x, level) for c in (plain, student))
    untrained = make_predictor(TorchNetwork(plain.model, plain.spec), student.spec)(x, level)
    image = np.clip((x - level.sigma * eps) / level.alpha, -1, 1)
    targets = (level.alpha * x - image) / level.sigma  # from x_0 = alpha x - sigma v
    assert np.square(v - targets).mean() < 0.75 * np.square(untrained - targets).mean()


def test_completed_halvings_are_not_repeated(
    unet: Checkpoint, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffpress.compress.distillation.student as student_module

    settings, ctx = config("progressive", start_steps=8), context(unet)
    undisturbed = distill(unet, settings, replace(ctx, work=ctx.work.with_name("other")))
    phases: list[str] = []

    def killed(student: nn.Module, objective: Objective, run: Training) -> nn.Module:
        if len(phases) == 1:
            raise KeyboardInterrupt
        phases.append(run.what)
        return train(student, objective, run)

    monkeypatch.setattr(student_module, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(unet, settings, ctx)

    def recorded(student: nn.Module, objective: Objective, run: Training) -> nn.Module:
        phases.append(run.what)
        return train(student, objective, run)

    monkeypatch.setattr(student_module, "train", recorded)
    assert distill(unet, settings, ctx).hash == undisturbed.hash
    assert phases == ["distill progressive 8 to 4 steps", "distill progressive 4 to 2 steps"]


def test_the_student_learns_the_guidance_of_the_plan(unet: Checkpoint, context: Callable[..., Context]) -> None:
    weighted = unet.evolve(spec=unet.spec.with_plan(replace(unet.spec.plan, guidance=3.0)))
    plain, guided = (distill(c, config("trajectory"), context(unet, data=False)) for c in (unet, weighted))
    assert plain.hash != guided.hash and guided.spec.plan.guidance == 1.0


def test_score_refuses_a_student_with_another_prediction_type(
    plain: Checkpoint, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    with pytest.raises(InvalidInputError, match="the teacher predicts v, the student epsilon"):
        distill(plain, config("score"), context(unet))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "progressive",
            {"start_steps": 6, "sample_steps": 2},
            "halving start_steps = 6 does not give sample_steps = 2",
        ),
        ("progressive", {"start_steps": 2, "sample_steps": 2}, "halving"),
        ("trajectory", {"sample_steps": 8, "trajectory_steps": 4}, "fewer than"),
        ("trajectory", {"other_steps": (8,), "trajectory_steps": 4}, "fewer than the student's 8"),
        ("trajectory", {"other_steps": (1, 2)}, "twice"),
        ("trajectory", {"other_steps": (0,)}, "greater than or equal to 1"),
        ("guidance", {"weight": 2.0, "weights": (1.0, 3.0)}, "not both"),
        ("guidance", {"weights": (3.0, 1.0)}, "minimum"),
    ],
)
def test_invalid_settings_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        config(kind, **settings)


def test_labels_change_the_output_of_the_student(unet: Checkpoint, context: Callable[..., Context]) -> None:
    ctx = context(unet, data=False)
    student = distill(unet, config("trajectory"), ctx)
    network = TorchNetwork(student.model, student.spec)
    a, b = (generate(network, student.spec, [0], np.array([label])) for label in (0, 2))
    assert not np.array_equal(a, b) and class_conditioning(student.spec, np.array([0])).uncond is not None
