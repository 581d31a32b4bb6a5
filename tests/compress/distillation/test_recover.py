"""compress/distillation/recover.py: a pruned student approaches its teacher, which stays unchanged."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.block_features import capture_features, energy_distance, energy_map
from diffpress.compress.distillation.conditioning import drop_conditioning
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.distillation.distill import distill
from diffpress.compress.evaluation.teacher_sqnr import teacher_sqnr_db
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.widths import widths_of
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import forward
from diffpress.compress.training.sample_data import SampleData
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec


def config(**settings: Any) -> RecoverConfig:
    return RecoverConfig(**{"steps": 4, "batch": 4, "learning_rate": 2e-3, "warmup": 2, "ema": 0.9, **settings})


def test_recovering_brings_the_student_closer_to_its_teacher(
    unet: Checkpoint, pruned: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(unet)
    recovered = distill(pruned, config(steps=40, batch=8), ctx)
    assert teacher_sqnr_db(recovered, unet, ctx.data) > teacher_sqnr_db(pruned, unet, ctx.data) + 3.0
    assert widths_of(recovered.model) == widths_of(pruned.model) and recovered.spec == pruned.spec


def test_teacher_and_input_checkpoint_are_unchanged(
    unet: Checkpoint, pruned: Checkpoint, context: Callable[..., Context]
) -> None:
    before = unet.hash, pruned.hash
    recovered = distill(pruned, config(), context(unet))
    # evolve, since a checkpoint caches its hash
    assert (unet.evolve().hash, pruned.evolve().hash) == before and recovered.hash != pruned.hash
    assert all(p.grad is None for p in unet.model.parameters())


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(
    unet: Checkpoint, pruned: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    hashes = [distill(pruned, config(), context(unet, seed=seed)).hash for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_task_loss_alone_trains_towards_the_data(
    plain: Checkpoint, context: Callable[..., Context], images: SampleData
) -> None:
    # without teacher terms the loss is the denoising loss
    settings = config(steps=40, batch=16, output_weight=0.0, feature_weight=0.0, task_weight=1.0, learning_rate=5e-3)
    trained = distill(plain, settings, context(plain))
    x0, _ = images.batch(32, torch.Generator().manual_seed(7))
    noise, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(8)), torch.full((32,), 60)
    alpha, sigma = plain.spec.schedule.alphas[60], plain.spec.schedule.sigmas[60]
    with torch.no_grad():
        losses = [
            ((forward(c.model, c.spec, alpha * x0 + sigma * noise, t, {}) - noise) ** 2).mean()
            for c in (plain, trained)
        ]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(("setting", "visited"), [("plan", {99, 74, 49, 24}), ("all", set(range(100)))])
def test_training_visits_the_configured_timesteps(
    setting: str,
    visited: set[int],
    unet: Checkpoint,
    pruned: Checkpoint,
    context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffpress.compress.training.losses import add_noise

    seen: set[int] = set()

    def spy(spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.update(t.tolist())
        return add_noise(spec, x0, noise, t)

    monkeypatch.setattr("diffpress.compress.distillation.recover.add_noise", spy)
    distill(pruned, config(steps=6, batch=16, feature_weight=0.0, timesteps=setting), context(unet))
    assert len(seen) > len(visited) * 0.5 and seen <= visited
    assert setting == "all" or {round(t) for t in unet.spec.plan.timesteps} == visited


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_min_snr_weights_each_sample_of_the_output_and_denoising_losses(
    gamma: float | None,
    unet: Checkpoint,
    pruned: Checkpoint,
    context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objectives: list[Objective] = []

    def observe(checkpoint: Checkpoint, objective: Objective, *rest: object) -> nn.Module:
        objectives.append(objective)
        return checkpoint.clone_model()

    monkeypatch.setattr("diffpress.compress.distillation.recover.train_student", observe)
    distill(pruned, config(task_weight=0.5, output_weight=2.0, feature_weight=0.0, min_snr_gamma=gamma), context(unet))
    x0, noise, t, cond = objectives[0].draw(torch.Generator().manual_seed(3), 0.0)
    alpha, sigma = (torch.tensor(table)[t].float() for table in (unet.spec.schedule.alphas, unet.spec.schedule.sigmas))
    snr, (a, s) = (alpha / sigma) ** 2, (level.view(-1, 1, 1, 1) for level in (alpha, sigma))
    with torch.no_grad():
        found = objectives[0].loss(pruned.model, x0, noise, t, cond)
        ours, theirs = (forward(one.model, unet.spec, a * x0 + s * noise, t, cond) for one in (pruned, unet))
    v = a * noise - s * x0
    losses = (2.0 * (ours - theirs) ** 2 + 0.5 * (ours - v) ** 2).mean((1, 2, 3))
    weights = torch.ones(4) if gamma is None else snr.clamp(max=gamma) / (snr + 1.0)
    torch.testing.assert_close(found, (weights * losses).mean(), rtol=1e-4, atol=0.0)
    assert gamma is None or not torch.allclose(weights, weights.mean().expand(4), rtol=0.1)


def test_min_snr_without_a_loss_to_weight_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="min_snr_gamma weights the output and denoising losses"):
        config(min_snr_gamma=5.0, output_weight=0.0)


def test_recovering_without_images_learns_from_samples_of_the_teacher(
    unet: Checkpoint, pruned: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(unet, data=False)
    recovered = distill(pruned, config(steps=40, batch=8, samples=24), ctx)
    assert teacher_sqnr_db(recovered, unet, None) > teacher_sqnr_db(pruned, unet, None) + 3.0
    assert [path.suffix for path in ctx.samples.iterdir()] == [".npy"]


# --- terms of the loss ------------------------------------------------------------------------------------------


def test_the_energy_distance_is_relative_and_averaged_over_blocks() -> None:
    references = {"a": torch.full((2, 4, 4), 4.0), "b": torch.full((2, 2, 2), 1.0)}
    same = {"a": torch.full((2, 3, 4, 4), 2.0), "b": torch.full((2, 6, 2, 2), 1.0)}
    assert energy_distance(same, references) == 0.0
    student = {"a": torch.full((2, 5, 4, 4), 1.0), "b": same["b"]}  # energies 1 and 4: (4 - 1)^2 / 4^2
    assert energy_distance(student, references).item() == pytest.approx((9 / 16 + 0) / 2)


class FixedOutput(nn.Module):
    """Block with a fixed output, such as (text, hidden states) of a joint transformer block."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> object:
        return self.output


def test_the_feature_of_a_block_is_its_hidden_states_and_the_energy_is_over_its_channels() -> None:
    tokens, image, text = torch.full((1, 4, 3), 2.0), torch.full((1, 5, 2, 2), 3.0), torch.zeros(1, 2, 3)
    for output in (tokens, (tokens, (text, text)), (text, tokens), (None, tokens), image):
        model = nn.Sequential(FixedOutput(output))
        with capture_features(model, ["0"]) as features:
            model[0]()
        assert features["0"] is (image if output is image else tokens)
    assert torch.equal(energy_map(tokens), torch.full((1, 4), 4.0))
    assert torch.equal(energy_map(image), torch.full((1, 2, 2), 9.0))


def test_features_are_collected_only_inside_the_context(unet: Checkpoint) -> None:
    blocks = adapter_for(unet.model).blocks(unet.model)
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([1, 50]), {"class_labels": torch.tensor([0, 1])}
    with torch.no_grad(), capture_features(unet.model, blocks) as features:
        forward(unet.model, unet.spec, *inputs)
    assert set(features) == set(blocks) and all(f.shape[0] == 2 and f.dim() == 4 for f in features.values())
    kept = dict(features)
    with torch.no_grad():
        forward(unet.model, unet.spec, *inputs)
    assert all(features[name] is kept[name] for name in blocks)


def test_a_tenth_of_the_labels_is_replaced_by_the_null_label() -> None:
    labels = torch.arange(20_000) % 3
    uncond = {"class_labels": torch.tensor([3])}
    dropped = drop_conditioning({"class_labels": labels}, uncond, torch.Generator().manual_seed(0))
    share = (dropped["class_labels"] == 3).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped["class_labels"][dropped["class_labels"] != 3], labels[dropped["class_labels"] != 3])


def test_a_tenth_of_the_samples_drops_all_text_inputs_and_keeps_the_guidance_weight() -> None:
    cond = {"words": torch.ones(20_000, 2, 3), "pooled": torch.full((20_000, 4), 2.0), "guidance": torch.ones(20_000)}
    uncond = {"words": torch.full((1, 2, 3), -1.0), "pooled": torch.full((1, 4), -2.0)}
    dropped = drop_conditioning(cond, uncond, torch.Generator().manual_seed(0))
    is_dropped = dropped["pooled"][:, 0] == -2.0
    assert is_dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert dropped["guidance"] is cond["guidance"] and set(dropped) == set(cond)
    for name in uncond:
        assert torch.equal(
            dropped[name][is_dropped], uncond[name].expand(int(is_dropped.sum()), *uncond[name].shape[1:])
        )
        assert torch.equal(dropped[name][~is_dropped], cond[name][~is_dropped])


def test_labels_are_kept_without_a_null_label() -> None:
    conditions = {"class_labels": torch.arange(5)}
    assert drop_conditioning(conditions, {}, torch.Generator()) is conditions


# --- other networks --------------------------------------------------------------------------------------------


class TimeInside(nn.Module):
    """Flow network whose float timestep goes through a linear layer directly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.time = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(1, 8)
        self.inner, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.first(sample) + self.time(timestep[:, None])[:, :, None, None]
        return self.last(torch.tanh(self.inner(torch.tanh(x))))


def test_a_flow_network_gets_float_timesteps_in_training_as_in_sampling(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = custom(TimeInside(), "flow")
    ctx = context(checkpoint)
    small = prune(checkpoint, PruneConfig(method="taylor", ratio=0.5, round_to=1, batch=4, timesteps=2), ctx)
    recovered = distill(small, config(), ctx)
    assert teacher_sqnr_db(recovered, checkpoint, ctx.data) < 200.0


def test_a_network_wrapped_in_ddp_is_evaluated_like_the_network_inside(unet: Checkpoint) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(unet.clone_model())
        inputs = torch.randn(2, 1, 8, 8), torch.tensor([1, 50]), {"class_labels": torch.tensor([0, 1])}
        assert torch.equal(forward(wrapped, unet.spec, *inputs), forward(unet.model, unet.spec, *inputs))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_training_on_a_gpu_gives_a_model_on_the_cpu(
    unet: Checkpoint, pruned: Checkpoint, context: Callable[..., Context]
) -> None:
    recovered = distill(pruned, config(), context(unet))
    assert {p.device.type for c in (recovered, unet) for p in c.model.parameters()} == {"cpu"}
    assert recovered.hash != pruned.hash and teacher_sqnr_db(recovered, unet, None) > 0.0
