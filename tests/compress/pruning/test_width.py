"""compress/pruning/width.py: the right channels are removed, shapes stay valid, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.widths import changed_widths, widths_of
from diffpress.compress.pruning.allocation import Candidate, allocate, choose_removed, keep_count
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec

METHODS, SCOPES = ("random", "magnitude", "taylor", "diff_pruning"), ("local", "global")


def config(method: str = "magnitude", ratio: float = 0.4, **settings: Any) -> PruneConfig:
    return PruneConfig(**{"method": method, "ratio": ratio, "round_to": 4, "batch": 4, "timesteps": 3, **settings})


def kept_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Return the indices of the rows of `before` that are left in `after`, if only rows were removed."""
    return [next(i for i, old in enumerate(before) if torch.equal(old, row)) for row in after]


class Chain(nn.Module):
    """A chain of three coupled groups of 16 channels, without normalization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.one(torch.tanh(self.first(sample))))
        return self.last(torch.tanh(self.two(x)))


# --- shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "unet"])
def test_a_pruned_unet_keeps_its_output_shape_and_is_smaller(
    kind: str, method: str, scope: str, request: pytest.FixtureRequest, context: Callable[..., Context]
) -> None:
    checkpoint = request.getfixturevalue(kind)
    small = prune(checkpoint, config(method, scope=scope), context(checkpoint))
    inputs = dummy_inputs(checkpoint.spec, 3)
    with torch.no_grad():
        out = adapter_for(small.model).forward(small.model, inputs)
    assert out.shape == inputs["sample"].shape and torch.isfinite(out).all()
    sizes = [sum(p.numel() for p in c.model.parameters()) for c in (checkpoint, small)]
    assert sizes[1] < 0.85 * sizes[0]
    assert all(p.grad is None for p in small.model.parameters())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("round_to", "groups"), [(4, 4), (8, 4), (4, 8), (3, 4)])
def test_kept_widths_are_divisible_by_round_to_and_the_groups_of_each_norm(
    scope: str, round_to: int, groups: int, unet_with: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = unet_with(norm_num_groups=groups, block_out_channels=[24, 48])
    small = prune(checkpoint, config(ratio=0.5, scope=scope, round_to=round_to), context(checkpoint))
    original, changed = checkpoint.source.original, changed_widths(small.model, checkpoint.source.original)
    narrowed = {name: found.get("out_channels") for name, found in changed.items()}
    widths = [width for name, width in narrowed.items() if width != original[name].get("out_channels")]
    assert widths and all(width is not None and width % math.lcm(round_to, groups) == 0 for width in widths)
    norms = [module for module in small.model.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and all(norm.num_groups == groups and norm.num_channels % groups == 0 for norm in norms)


@pytest.mark.parametrize("method", METHODS)
def test_equally_many_channels_are_removed_from_each_normalization_group(
    method: str, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    small = prune(unet, config(method, ratio=0.5), context(unet))
    before: Any = unet.model
    after: Any = small.model
    kept = kept_rows(before.conv_in.weight, after.conv_in.weight)
    per_group = [sum(i // 4 == group for i in kept) for group in range(4)]
    assert per_group == [2, 2, 2, 2] and kept == sorted(kept)


def test_attention_loses_complete_heads_and_no_more_than_requested(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    small = prune(unet, config(ratio=0.4), context(unet))
    for name, before in unet.model.named_modules():
        if not hasattr(before, "to_q"):
            continue
        after: Any = small.model.get_submodule(name)
        assert (before.heads, after.heads) == (4, 3)
        for projection in ("to_q", "to_k", "to_v"):
            # the biases identify the rows: input channels are pruned as well
            kept = kept_rows(getattr(before, projection).bias, getattr(after, projection).bias)
            assert len(kept) == 24 and kept == [h * 8 + i for h in sorted({k // 8 for k in kept}) for i in range(8)]


def test_the_heads_with_the_least_weight_are_removed(unet: Checkpoint, context: Callable[..., Context]) -> None:
    model: Any = unet.clone_model()
    attention = model.mid_block.attentions[0]
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            layer.weight[8:16] *= 0.01  # head 1
        attention.to_out[0].weight[:, 8:16] *= 0.01
    small = prune(unet.evolve(model=model), config(ratio=0.25), context(unet))
    pruned: Any = small.model
    kept = kept_rows(attention.to_v.bias, pruned.mid_block.attentions[0].to_v.bias)
    assert {i // 8 for i in kept} == {0, 2, 3}


@pytest.mark.parametrize("scope", SCOPES)
def test_fixed_layers_keep_their_outputs(scope: str, unet: Checkpoint, context: Callable[..., Context]) -> None:
    small = prune(unet, config(ratio=0.6, scope=scope), context(unet))
    adapter, before, after = adapter_for(unet.model), widths_of(unet.model), widths_of(small.model)
    kept = adapter.fixed(unet.model)
    assert {"conv_out", "time_embedding.linear_1", "class_embedding"} <= set(kept)
    for name in kept:
        out = next(key for key in ("out_channels", "out_features", "embedding_dim") if key in before[name])
        assert before[name][out] == after[name][out]
    assert after["conv_in"]["out_channels"] < before["conv_in"]["out_channels"]


def test_scale_shift_time_embeddings_are_pruned_validly(
    unet_with: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = unet_with(resnet_time_scale_shift="scale_shift")
    small = prune(checkpoint, config(), context(checkpoint))
    assert changed_widths(small.model, checkpoint.source.original)


class Depthwise(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(16, 16, 3, padding=1, groups=16)


def test_a_module_with_depthwise_convolutions_is_pruned_validly(
    custom: Callable[..., Checkpoint], context: Callable[..., Context], output: Callable[[Checkpoint], torch.Tensor]
) -> None:
    checkpoint = custom(Depthwise())
    small = prune(checkpoint, config(ratio=0.5), context(checkpoint))
    model: Any = small.model
    assert model.two.groups == model.two.out_channels == 8
    assert torch.isfinite(output(small)).all()


@pytest.mark.parametrize("resample", ["ResnetDownsampleBlock2D", "DownBlock2D"])
def test_a_unet_whose_resampling_layers_torch_pruning_does_not_follow_is_pruned(
    resample: str, unet_with: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    up = {"DownBlock2D": "UpBlock2D", "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D"}[resample]
    blocks = {"down_block_types": [resample, "DownBlock2D"], "up_block_types": ["UpBlock2D", up]}
    checkpoint = unet_with(**blocks)
    small = prune(checkpoint, config(), context(checkpoint))
    assert changed_widths(small.model, checkpoint.source.original)


# --- which channels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_magnitude_removes_the_dead_channels(
    scope: str,
    custom: Callable[..., Checkpoint],
    context: Callable[..., Context],
    output: Callable[[Checkpoint], torch.Tensor],
) -> None:
    # the same share of all three groups is dead, so that both scopes must find exactly these channels
    model, dead = Chain(), {"first": [3, 7, 8, 12], "one": [0, 1, 2, 15], "two": [4, 5, 6, 9]}
    chain = [model.first, model.one, model.two, model.last]
    with torch.no_grad():
        for (name, channels), after in zip(dead.items(), chain[1:], strict=True):
            getattr(model, name).weight[channels] = 0.0
            getattr(model, name).bias[channels] = 0.0
            after.weight[:, channels] = 0.0
    checkpoint = custom(model)
    small = prune(checkpoint, config(ratio=0.25, scope=scope), context(checkpoint))
    for name, channels in dead.items():
        kept = kept_rows(getattr(model, name).bias, getattr(small.model, name).bias)
        assert sorted({*range(16)} - {*kept}) == channels
    torch.testing.assert_close(output(small), output(checkpoint), atol=1e-6, rtol=0)


def test_global_scope_removes_channels_from_the_group_that_loses_nothing(
    custom: Callable[..., Checkpoint], context: Callable[..., Context], output: Callable[[Checkpoint], torch.Tensor]
) -> None:
    model, dead = Chain(), list(range(4, 16))
    assert model.one.bias is not None
    with torch.no_grad():
        model.one.weight[dead] = model.one.bias[dead] = 0.0
        model.two.weight[:, dead] = 0.0
    checkpoint = custom(model)
    small = prune(checkpoint, config(ratio=0.25, scope="global"), context(checkpoint))  # 12 of 48 channels
    pruned: Any = small.model
    widths = [pruned.first.out_channels, pruned.one.out_channels, pruned.two.out_channels]
    assert widths == [16, 4, 16]
    torch.testing.assert_close(output(small), output(checkpoint), atol=1e-6, rtol=0)


def test_local_scope_removes_the_same_share_of_every_group(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = custom(Chain())
    small = prune(checkpoint, config(ratio=0.25), context(checkpoint))
    assert [getattr(small.model, name).out_channels for name in ("first", "one", "two")] == [12, 12, 12]


def test_taylor_ranks_channels_by_weight_times_gradient(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    model = Chain()
    checkpoint, ctx = custom(model, "epsilon"), context(custom(model, "epsilon"), seed=5)
    settings = config("taylor", ratio=0.5)
    small = prune(checkpoint, settings, ctx)

    # reference: one batch, one noise, gradients summed over the timesteps
    generator = torch.Generator().manual_seed(5)
    assert ctx.data is not None
    x0, _ = ctx.data.batch(4, generator)
    noise = torch.randn(x0.shape, generator=generator)
    total = torch.zeros(())
    for t in (0, 24, 49):
        alpha, sigma = checkpoint.spec.schedule.alphas[t], checkpoint.spec.schedule.sigmas[t]
        out = model(alpha * x0 + sigma * noise, torch.full((4,), t))
        total = total + ((out - noise) ** 2).mean()
    chain = [model.first, model.one, model.two, model.last]
    gradients = torch.autograd.grad(total, [layer.weight for layer in chain])
    terms = [(layer.weight * gradient).abs() for layer, gradient in zip(chain, gradients, strict=True)]
    for i, name in enumerate(("first", "one", "two")):
        score = terms[i].sum((1, 2, 3)) + terms[i + 1].sum((0, 2, 3))
        bias = chain[i].bias
        assert bias is not None
        kept = kept_rows(bias, getattr(small.model, name).bias)
        assert kept == sorted(score.argsort(descending=True)[:8].tolist())


def test_diff_pruning_stops_when_the_loss_falls_below_the_threshold(
    custom: Callable[..., Checkpoint], context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, seen = iter([1.0, 4.0, 0.3, 0.1, 2.0]), []

    def loss_at(
        model: nn.Module,
        spec: DenoiserSpec,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        conditions: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        seen.append(int(t[0]))
        return sum((p.sum() for p in model.parameters()), torch.zeros(())) * 0.0 + next(losses)

    monkeypatch.setattr("diffpress.compress.pruning.importance.epsilon_loss", loss_at)
    checkpoint = custom(Chain())
    prune(checkpoint, config("diff_pruning", timesteps=5, threshold=0.05), context(checkpoint))
    assert seen == [0, 12, 24, 36]


def test_choose_removed_takes_the_least_important_of_each_group() -> None:
    scores = torch.tensor([9.0, 1.0, 8.0, 2.0, 0.1, 0.2, 0.4, 0.3])
    assert choose_removed(scores, 4, 2) == [1, 3, 4, 5]
    assert choose_removed(scores, 4, 1) == [4, 5, 6, 7]
    assert choose_removed(scores, 8, 2) == []


@pytest.mark.parametrize(
    ("channels", "ratio", "unit", "kept"),
    [(64, 0.25, 8, 48), (64, 0.875, 8, 8), (64, 0.01, 8, 64), (6, 0.5, 8, 6), (8, 0.9, 8, 8), (64, 0.3, 1, 45)],
)
def test_the_number_of_kept_channels(channels: int, ratio: float, unit: int, kept: int) -> None:
    assert keep_count(channels, ratio, unit) == kept


def test_allocation_removes_what_loses_least_per_saved_cost_and_keeps_a_quarter() -> None:
    high_cost = Candidate(torch.full((16,), 1.0), 1, 4, 10.0, print)
    low_cost = Candidate(torch.full((16,), 1.0), 1, 4, 1.0, print)
    assert allocate([high_cost, low_cost], 0.25) == [8, 16]
    assert allocate([high_cost, low_cost], 0.5) == [4, 12]
    assert allocate([high_cost, low_cost], 0.75) == [4, 4]
    with pytest.raises(InvalidInputError, match=r"ratio 0\.99 leaves too little of some layer; at most 0\.75 can be"):
        allocate([high_cost, low_cost], 0.99)


# --- determinism and inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_pruning_does_not_change_its_input(method: str, unet: Checkpoint, context: Callable[..., Context]) -> None:
    before, widths = unet.hash, widths_of(unet.model)
    prune(unet, config(method), context(unet))
    assert unet.evolve().hash == before and widths_of(unet.model) == widths
    assert all(p.grad is None for p in unet.model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_pruning_is_deterministic(method: str, unet: Checkpoint, context: Callable[..., Context]) -> None:
    one, two = (prune(unet, config(method), context(unet, seed=3)) for _ in range(2))
    assert one.hash == two.hash


def test_random_pruning_depends_on_the_seed(unet: Checkpoint, context: Callable[..., Context]) -> None:
    one, two = (prune(unet, config("random"), context(unet, seed=seed)) for seed in (3, 4))
    assert one.hash != two.hash


def test_a_pruned_checkpoint_can_be_pruned_again(pruned: Checkpoint, context: Callable[..., Context]) -> None:
    before: Any = pruned.model
    again: Any = prune(pruned, config(ratio=0.5), context(pruned)).model
    assert again.conv_in.out_channels < before.conv_in.out_channels < 16


# --- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(InvalidInputError, match=r"diffpress\.Prune\.ratio: "):
        PruneConfig(ratio=ratio)


@pytest.mark.parametrize(("scope", "message"), [("local", "leaves nothing"), ("global", "leaves too little")])
def test_a_ratio_that_leaves_nothing_is_refused(
    scope: str, message: str, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    with pytest.raises(InvalidInputError, match=f"prune: ratio 0.99 {message} .* most .*0.75"):
        prune(unet, config(ratio=0.99, scope=scope), context(unet))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_high_ratio_still_leaves_a_working_model(
    scope: str, unet: Checkpoint, context: Callable[..., Context], output: Callable[[Checkpoint], torch.Tensor]
) -> None:
    small = prune(unet, config(ratio=0.7, scope=scope), context(unet))
    assert torch.isfinite(output(small)).all()
    assert min(min(widths.values()) for widths in widths_of(small.model).values()) >= 1


def test_a_ratio_that_removes_nothing_is_refused(unet: Checkpoint, context: Callable[..., Context]) -> None:
    with pytest.raises(InvalidInputError, match=r"prune: ratio 0\.01 with round_to 16 removes nothing"):
        prune(unet, config(ratio=0.01, round_to=16), context(unet))


class Dead(Chain):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().forward(sample, timestep) / (self.first.out_channels - 8)


def test_a_pruned_model_with_non_finite_output_is_refused(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = custom(Dead())
    with pytest.raises(InvalidInputError, match="prune: the pruned model returns"):
        prune(checkpoint, config(ratio=0.5), context(checkpoint))
