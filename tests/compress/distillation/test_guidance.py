"""compress/distillation/guidance.py: one evaluation instead of two, for baked-in and input weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.conditioning import effective_guidance, guided_output
from diffpress.compress.distillation.config import GuidanceConfig
from diffpress.compress.distillation.distill import KINDS, distill
from diffpress.compress.distillation.few_steps import student_spec
from diffpress.compress.distillation.guidance import with_guidance_input
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.losses import forward
from diffpress.runtime.denoiser import make_predictor
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import evaluations_per_step
from diffpress.runtime.network_inputs import class_conditioning
from diffpress.runtime.noise_schedule import noise_level_at


def config(**settings: Any) -> GuidanceConfig:
    shared: dict[str, Any] = {"steps": 4, "batch": 8, "learning_rate": 2e-3, "warmup": 1, "ema": 0.5, "samples": 8}
    return GuidanceConfig(**{"kind": "guidance", **shared, **settings})


def progressive(checkpoint: Checkpoint, ctx: Context) -> Checkpoint:
    """Distill the checkpoint to two steps."""
    settings = {"kind": "progressive", "start_steps": 4, "sample_steps": 2, "steps": 2, "batch": 4, "warmup": 1}
    return distill(checkpoint, KINDS["progressive"].config(**settings), ctx)


def predictions(checkpoint: Checkpoint, weight: float) -> np.ndarray:
    """Return the prediction that a sampler with this guidance weight uses at one noise level."""
    x = np.random.default_rng(0).standard_normal((6, 1, 8, 8), dtype=np.float32)
    network, cond = (
        TorchNetwork(checkpoint.model, checkpoint.spec),
        class_conditioning(checkpoint.spec, np.arange(6) % 3),
    )
    predict = make_predictor(network, checkpoint.spec, conditions=cond, guidance=weight)
    return predict(x, noise_level_at(checkpoint.spec.schedule, 50))


def test_the_guided_output_matches_the_sampler(unet: Checkpoint) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 1, 8, 8), dtype=np.float32))
    cond, uncond = {"class_labels": torch.arange(6) % 3}, {"class_labels": torch.tensor([3])}
    for weight in (1.0, 2.5):
        for weights in (weight, torch.full((6,), weight)):
            found = guided_output(unet.model, unet.spec, x, torch.full((6,), 50), cond, uncond, weights)
            np.testing.assert_allclose(found.numpy(), predictions(unet, weight), atol=1e-5)


def test_a_student_matches_guidance_in_one_evaluation(unet: Checkpoint, context: Callable[..., Context]) -> None:
    student = distill(unet, config(weight=4.0, steps=40), context(unet))
    assert student.spec.plan.guidance == 1.0 and evaluations_per_step(student.spec) == 1
    expected = predictions(unet, 4.0)
    before, after = (np.square(predictions(c, 1.0) - expected).mean() for c in (unet, student))
    assert after < 0.8 * before


def test_the_weight_defaults_to_that_of_the_plan(unet: Checkpoint, context: Callable[..., Context]) -> None:
    weighted = unet.evolve(spec=unet.spec.with_plan(replace(unet.spec.plan, guidance=3.0)))
    hashes = [distill(c, s, context(unet)).hash for c, s in ((weighted, config()), (unet, config(weight=3.0)))]
    assert hashes[0] == hashes[1]


def test_a_model_without_a_null_label_is_refused_and_so_is_weight_one(
    unet: Checkpoint, plain: Checkpoint, context: Callable[..., Context]
) -> None:
    with pytest.raises(InvalidInputError, match="no null label"):
        distill(plain, config(weight=2.0), context(plain))
    with pytest.raises(InvalidInputError, match="weight 1 is no guidance; set one above 1"):
        distill(unet, config(), context(unet))
    with pytest.raises(InvalidInputError, match="a UNet2DModel has no input for the guidance weight"):
        distill(unet, config(weights=(1.0, 4.0)), context(unet))


def test_a_student_with_a_weight_input_starts_as_the_teacher_reloads_and_needs_one_evaluation(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = load_checkpoint(tiny_folder("sd"))
    start = with_guidance_input(teacher)
    network: Any = teacher.model
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 77, network.config.cross_attention_dim),
    }
    with torch.no_grad():
        plain = adapter_for(teacher.model).forward(teacher.model, inputs)
        weighted = adapter_for(start.model).forward(start.model, inputs | {"guidance": torch.tensor([2.0, 7.0])})
    torch.testing.assert_close(weighted, plain)
    ctx = Context(0, tmp_path / "stages" / ".work", teacher)
    student = distill(teacher, config(weights=(2.0, 8.0), batch=2, steps=2, samples=2), ctx)
    assert student.spec.conditioning.guidance_input and evaluations_per_step(student.spec) == 1
    assert student.spec.plan.guidance == teacher.spec.plan.guidance
    save_checkpoint(student, tmp_path / "saved")
    again = load_checkpoint(str(tmp_path / "saved"))
    assert again.spec == student.spec and again.hash == student.hash
    forward = adapter_for(again.model).forward
    outputs = [forward(again.model, inputs | {"guidance": torch.full((2,), weight)}) for weight in (2.0, 8.0)]
    assert not torch.equal(*outputs)


def test_the_effective_guidance_is_that_of_the_plan_or_else_baked_in(unet: Checkpoint) -> None:
    planned = unet.spec.with_plan(replace(unet.spec.plan, guidance=3.0))
    found = [effective_guidance(replace(spec, baked_in_guidance=4.0)) for spec in (unet.spec, planned)]
    assert (effective_guidance(unet.spec), effective_guidance(planned), *found) == (1.0, 3.0, 4.0, 3.0)


def test_later_kinds_still_use_the_guided_teacher_after_guidance_distillation(
    unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    ctx = context(unet)
    save_checkpoint(distill(unet, config(weight=4.0), ctx), tmp_path / "saved")
    assert ctx.notes == {"guidance": 4.0}
    guided = load_checkpoint(tmp_path / "saved")
    assert guided.spec.plan.guidance == 1.0 and guided.spec.baked_in_guidance == 4.0
    few = progressive(guided, context(unet))
    assert few.spec.plan.guidance == 1.0 and few.spec.baked_in_guidance == 4.0
    by_plan = replace(guided.spec, plan=replace(guided.spec.plan, guidance=4.0), baked_in_guidance=1.0)
    assert progressive(guided.evolve(spec=by_plan), context(unet)).hash == few.hash
    unguided = progressive(guided.evolve(spec=replace(guided.spec, baked_in_guidance=1.0)), context(unet))
    assert not torch.equal(unguided.model.state_dict()["conv_in.weight"], few.model.state_dict()["conv_in.weight"])


@pytest.mark.parametrize("kind", ["progressive", "trajectory", "score"])
def test_every_kind_that_learns_from_a_guided_teacher_stores_the_weight_in_the_spec(
    kind: str, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    weighted = unet.evolve(spec=unet.spec.with_plan(replace(unet.spec.plan, guidance=3.0)))
    own = {"trajectories": 8, "trajectory_steps": 4} if kind == "trajectory" else {}
    settings = KINDS[kind].config(**{"steps": 1, "batch": 4, "samples": 8, **own})
    ctx = context(weighted)
    spec = distill(weighted, settings, ctx).spec
    assert (spec.plan.guidance, spec.baked_in_guidance, ctx.notes["guidance"]) == (1.0, 3.0, 3.0)
    assert distill(unet, settings, context(unet)).spec.baked_in_guidance == 1.0


def test_a_weight_input_takes_the_weight_of_the_plan_and_is_not_combined_with_guidance(
    tiny_folder: Callable[..., Path],
) -> None:
    checkpoint = load_checkpoint(tiny_folder("lcm"))
    spec, model = checkpoint.spec, checkpoint.model
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *spec.sample_shape, generator=generator), torch.tensor([500, 900])
    cond = {name: torch.randn(2, *e.shape, generator=generator) for name, e in spec.conditioning.inputs.items()}
    with torch.no_grad():
        by_plan, by_hand, other = (
            forward(model, spec, x, t, cond | extra)
            for extra in ({}, {"guidance": torch.full((2,), spec.plan.guidance)}, {"guidance": torch.ones(2)})
        )
    assert torch.equal(by_plan, by_hand) and not torch.allclose(by_plan, other)
    for weight in (spec.plan.guidance, torch.full((2,), spec.plan.guidance)):
        assert torch.equal(guided_output(model, spec, x, t, cond, {}, weight), by_hand)
    few = student_spec(spec, "trajectory", "euler", (900.0,))
    assert few.plan.guidance == spec.plan.guidance != 1.0
