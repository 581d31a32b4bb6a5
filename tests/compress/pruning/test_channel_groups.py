"""compress/pruning/channel_*.py: any module is pruned, and a pruned channel's effect on the output is exact."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AuraFlowTransformer2DModel
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.dry_run import Estimate, estimate_width
from diffpress.compress.models.adapter import dummy_inputs
from diffpress.compress.models.counts import count
from diffpress.compress.models.kept_indices import Removals
from diffpress.compress.models.widths import apply_widths_, changed_widths
from diffpress.compress.pruning.allocation import choose_removed, keep_count
from diffpress.compress.pruning.channel_groups import traced_groups
from diffpress.compress.pruning.channel_ids import ChannelIds
from diffpress.compress.pruning.channel_removal import TracedModel
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.runtime.errors import InvalidInputError
from tests.compress.pruning.networks import EXACT, NORMS, UNETS, Apply, Build, first, last, with_tied_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's notes on the older weight_norm, unused num_features

Prune = Callable[..., Checkpoint]


@pytest.fixture
def pruned_by(context: Callable[..., Context]) -> Prune:
    def run(checkpoint: Checkpoint, method: str = "magnitude", ratio: float = 0.5, **settings: Any) -> Checkpoint:
        settings = {"round_to": 1, "batch": 4, "timesteps": 3, **settings}
        return prune(checkpoint, PruneConfig(method=method, ratio=ratio, **settings), context(checkpoint))

    return run


def built(build: Build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        return build().eval()


def outputs(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(7)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(torch.randn(3, 1, 8, 8), torch.tensor([1, 20, 40]))
    return result


def halve_(model: nn.Module, spec: Any) -> tuple[TracedModel, dict[Any, Any]]:
    """Remove half of every group from `model`; return its channels and those it had."""
    ones = lambda weight: torch.ones_like(weight)  # noqa: E731
    traced, candidates, _ = traced_groups(model, dummy_inputs(spec, 2), 1, 0.3, ones, Removals(model))
    before = dict(traced.slots)
    for candidate in candidates:
        keep = keep_count(candidate.channels, 0.5, candidate.unit)
        candidate.remove(choose_removed(torch.arange(candidate.channels) % 3, keep, candidate.norm_groups))
    return traced, before


# --- exact -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_removing_channels_of_zeros_does_not_change_the_output(name: str, custom: Callable[..., Checkpoint]) -> None:
    checkpoint = custom(built(EXACT[name]))
    traced, before = halve_(checkpoint.clone_model(), checkpoint.spec)
    model = checkpoint.clone_model()
    state = model.state_dict()
    for (tensor, dim), roots in before.items():
        if tensor in state and not (
            tensor.endswith(("original1", "weight_v")) and dim == 0
        ):  # a norm of 0 divides by 0
            gone = [i for i, root in enumerate(roots) if root not in traced.slots[tensor, dim]]
            state[tensor].index_fill_(dim, torch.tensor(gone, dtype=torch.int64), 0.0)
    expected, size = outputs(model), sum(p.numel() for p in model.parameters())
    halve_(model, checkpoint.spec)
    torch.testing.assert_close(outputs(model), expected, atol=2e-5, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * size


@pytest.mark.parametrize("name", NORMS)
def test_a_normalization_takes_its_statistics_over_the_channels_that_are_kept(
    name: str, custom: Callable[..., Checkpoint], pruned_by: Prune
) -> None:
    # each channel has a copy that nothing reads: without the copies, mean and variance are the same
    model: Any = built(NORMS[name])
    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias, *model.norm.parameters()):
            dim = next((d for d, size in enumerate(tensor.shape) if size == 16), 0)
            tensor.copy_(tensor.index_select(dim, torch.arange(16) // 2 * 2))
        model.last.weight.copy_(model.last.weight.sign())
        model.last.weight[:, 1::2] = 0.0
    small: Any = pruned_by(custom(model))
    assert small.model.first.out_channels == 8
    torch.testing.assert_close(outputs(small.model), outputs(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["spectral norm", "older spectral norm"])
def test_a_spectral_norm_divides_by_the_same_value_after_pruning(
    name: str, custom: Callable[..., Checkpoint], pruned_by: Prune
) -> None:
    model: Any = built(EXACT[name])
    front, norm, end = model.net[0], model.net[2], model.net[-1]
    weight = norm.weight_orig if hasattr(norm, "weight_orig") else norm.parametrizations.weight.original
    rows = weight if weight.shape[0] == 24 else weight.transpose(0, 1)
    with torch.no_grad():
        # nothing reads these channels; their weights are the smallest, but they are part of the norm
        front.weight[:4] *= 0.01
        rows[:, :4] = 0.0
        rows[:6] *= 0.5
        end.weight[:, :6] = 0.0
    small: Any = pruned_by(custom(model), ratio=0.25)
    assert (small.model.net[0].out_channels, small.model.net[-1].in_channels) == (12, 18)
    torch.testing.assert_close(outputs(small.model), outputs(model), atol=1e-5, rtol=1e-4)


# --- widths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EXACT, *NORMS, *UNETS])
def test_a_pruned_module_is_rebuilt_from_its_widths_bit_for_bit(
    name: str, custom: Callable[..., Checkpoint], pruned_by: Prune
) -> None:
    build = {**EXACT, **NORMS, **UNETS}[name]
    checkpoint = custom(built(build))
    small = pruned_by(checkpoint, round_to=4 if name in UNETS else 1)
    widths = json.loads(json.dumps(changed_widths(small.model, checkpoint.source.original)))
    assert widths
    fresh = built(build, seed=1)
    apply_widths_(fresh, widths, "here")
    fresh.load_state_dict(small.model.state_dict())
    assert torch.equal(outputs(fresh), outputs(small.model))


def test_tied_weights_stay_tied(custom: Callable[..., Checkpoint], pruned_by: Prune) -> None:
    checkpoint = custom(with_tied_weights())
    model: Any = pruned_by(checkpoint).model
    assert model.one.weight is model.two.weight and model.one.out_channels == 8
    fresh: Any = with_tied_weights()
    apply_widths_(fresh, changed_widths(model, checkpoint.source.original), "here")
    assert fresh.one.weight is fresh.two.weight and fresh.one.weight.shape == (8, 8, 1, 1)


# --- hand-written U-Nets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("method", ["magnitude", "taylor", "random"])
@pytest.mark.parametrize("name", UNETS)
def test_a_hand_written_unet_is_pruned(
    name: str, method: str, scope: str, custom: Callable[..., Checkpoint], pruned_by: Prune
) -> None:
    checkpoint = custom(built(UNETS[name]), "epsilon")
    small = pruned_by(checkpoint, method, scope=scope, round_to=4)
    before, after = (count(c.model, c.spec) for c in (checkpoint, small))
    assert after.parameters < 0.6 * before.parameters and after.macs < 0.6 * before.macs
    out = outputs(small.model)
    assert out.shape == (3, 1, 8, 8) and torch.isfinite(out).all()


def test_a_transformer_of_diffusers_without_an_adapter_is_pruned(
    custom: Callable[..., Checkpoint], pruned_by: Prune
) -> None:
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "pos_embed_max_size": 16}
    widths = {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
    }
    widths["caption_projection_dim"] = 32
    network = AuraFlowTransformer2DModel(**sizes, **widths, num_mmdit_layers=1, num_single_dit_layers=1)
    states = torch.randn(1, 5, 16)
    model = Apply(
        lambda m, x, t: m.network(x, states.expand(len(x), -1, -1), t.float() / 1000, return_dict=False)[0],
        network=network,
    )
    small = pruned_by(custom(model), round_to=4)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small.model))
    assert after < 0.5 * before and outputs(small.model).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(("scope", "kept"), [("local", 30), ("global", 25)])
def test_group_normalizations_over_a_skip_connection_keep_equally_many_channels_of_each_group(
    scope: str, kept: int, custom: Callable[..., Checkpoint], pruned_by: Prune
) -> None:
    model: Any = Apply(
        lambda m, x, t: m.last(torch.tanh(m.norm(torch.cat([m.first(x), m.second(torch.tanh(m.first(x)))], 1)))),
        first=first(24),
        second=nn.Conv2d(24, 16, 3, padding=1),
        norm=nn.GroupNorm(5, 40),  # groups of 8 channels, three of them from the first convolution
        last=last(40),
    )
    with torch.no_grad():
        model.second.weight *= 100  # scope global would take all channels from the first convolution
    small: Any = pruned_by(custom(model), ratio=0.3, scope=scope).model
    assert small.norm.num_channels == kept
    assert (small.first.out_channels, small.second.out_channels) == (kept * 3 // 5, kept * 2 // 5)


# --- skipped and refused ---------------------------------------------------------------------------------------


def sliced(m: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    h = torch.tanh(m.first(x))
    return m.last(torch.tanh(m.second(h[:, 4:8]))) + m.other(h)


def test_a_group_whose_width_is_a_constant_of_the_code_is_skipped_and_named(
    custom: Callable[..., Checkpoint], pruned_by: Prune, caplog: pytest.LogCaptureFixture
) -> None:
    layers = {"first": first(), "second": nn.Conv2d(4, 16, 3, padding=1), "last": last(), "other": last()}
    with caplog.at_level(logging.WARNING):
        small: Any = pruned_by(custom(Apply(sliced, **layers))).model
    assert (small.first.out_channels, small.second.out_channels) == (16, 8)
    assert caplog.messages == ["prune: skipped: first: the code contains the number of channels (slice)"]


def test_an_operation_that_is_not_followed_keeps_its_layers_and_is_named(
    custom: Callable[..., Checkpoint], pruned_by: Prune, caplog: pytest.LogCaptureFixture
) -> None:
    layers = {"first": first(), "second": nn.Conv2d(16, 16, 3, padding=1), "last": last()}
    model = Apply(lambda m, x, t: m.last(torch.tanh(m.second(m.first(x).sort(dim=1)[0]))), **layers)
    with caplog.at_level(logging.WARNING):
        small: Any = pruned_by(custom(model)).model
    assert (small.first.out_channels, small.second.out_channels) == (16, 8)
    assert caplog.messages == ["prune: skipped: first: is read by an operation that pruning does not follow (sort)"]


def beside(layer: nn.Module, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> nn.Module:
    """Add `layer`, which is run on [B, 16, 8, 8], to the hidden states of a network with a prunable middle."""
    layers = {"first": first(), "layer": layer, "second": nn.Conv2d(16, 16, 3, padding=1), "last": last()}
    return Apply(lambda m, x, t: m.last(torch.tanh(m.second(torch.tanh(run(m.layer, m.first(x)))))), **layers)


def in_rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = layer(x.flatten(2).transpose(1, 2))
    return (found[0] if isinstance(found, tuple) else found).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("layer", "run", "reason"),
    [
        (
            lambda: nn.ConvTranspose2d(16, 16, 3, padding=1, groups=4),
            lambda layer, x: layer(x),
            "is in a grouped transposed convolution",
        ),
        (lambda: nn.LSTM(16, 16, batch_first=True), in_rows, "is read by an operation that pruning does not follow"),
        (lambda: nn.GRU(16, 16, batch_first=True), in_rows, "the code does not run with fewer channels"),
        (
            lambda: nn.Bilinear(16, 16, 16),
            lambda layer, x: layer(x.movedim(1, -1), x.movedim(1, -1)).movedim(-1, 1),
            "is read by an operation that pruning does not follow (_trilinear)",
        ),
    ],
    ids=["grouped transposed convolution", "LSTM", "GRU", "Bilinear"],
)
def test_a_layer_that_cannot_be_pruned_is_left_alone_and_named(
    layer: Build,
    run: Any,
    reason: str,
    custom: Callable[..., Checkpoint],
    pruned_by: Prune,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = beside(built(layer), run)
    with caplog.at_level(logging.WARNING):
        small: Any = pruned_by(custom(model)).model
    assert (small.first.out_channels, small.second.out_channels) == (16, 8)
    shapes = [[tuple(p.shape) for p in one.layer.parameters()] for one in (model, small)]  # type: ignore[union-attr]
    assert shapes[0] == shapes[1]
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("prune: skipped: ")
    assert "first" in caplog.messages[0] and reason in caplog.messages[0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x, t: m.last(m.first(x).softmax(1)), "is summed over (_softmax)"),
        (lambda m, x, t: m.last(m.first(x) * m.first(x).mean(1, keepdim=True).sigmoid()), "else than a normalization"),
        (lambda m, x, t: m.last(m.first(x) + x.repeat(1, 16, 1, 1)), "combined with a tensor of fixed size (add)"),
        (
            lambda m, x, t: F.conv2d(m.first(x), m.last.weight[:, torch.arange(16)], padding=1),
            "meets a matrix of fixed size",
        ),
    ],
)
def test_a_model_of_which_nothing_can_be_removed_is_refused_with_the_reasons(
    function: Any, reason: str, custom: Callable[..., Checkpoint], pruned_by: Prune
) -> None:
    with pytest.raises(InvalidInputError, match="prune: no channels of this model can be removed: first: ") as refused:
        pruned_by(custom(Apply(function, first=first(), last=last())))
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_that_writes_its_output_at_once_is_refused(custom: Callable[..., Checkpoint], pruned_by: Prune) -> None:
    with pytest.raises(InvalidInputError, match="all layers write the network's output"):
        pruned_by(custom(Apply(lambda m, x, t: m.only(x), only=nn.Conv2d(1, 1, 3, padding=1))))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_dry_run_names_what_is_skipped_and_refuses_what_the_run_refuses(
    scope: Any, custom: Callable[..., Checkpoint], caplog: pytest.LogCaptureFixture
) -> None:
    config = PruneConfig(method="taylor", ratio=0.5, scope=scope, round_to=4)
    estimate = estimate_width(Estimate(custom(built(UNETS["annotated"])), {}), config, 0)
    assert (estimate.sizes is None) == (scope == "global")
    assert caplog.messages == [
        "prune: skipped: attention.projection: is summed in a product of activations, as in attention"
    ]
    nothing = custom(Apply(lambda m, x, t: m.only(x), only=nn.Conv2d(1, 1, 3, padding=1)))
    with pytest.raises(InvalidInputError, match="no channels of this model can be removed"):
        estimate_width(Estimate(nothing, {}), config, 0)


def test_taylor_without_data_uses_samples_of_the_teacher(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = custom(built(UNETS["minimal"]), "epsilon")
    config = PruneConfig(method="taylor", ratio=0.5, round_to=4, batch=4, timesteps=3)
    small = prune(checkpoint, config, context(checkpoint, data=False))
    assert changed_widths(small.model, checkpoint.source.original)


def test_coupled_ids_share_the_reason_of_the_first_that_is_fixed() -> None:
    ids = ChannelIds()
    one, two, three = ids.new(2), ids.new(2), ids.new(2)
    ids.couple(one, two, "never")
    ids.fix(two[:1], "read by hand")
    ids.couple(two, three, "never")
    assert [ids.reason(int(i)) for i in three] == ["read by hand", None]
    ids.couple(three, None, "meets the input")
    assert [ids.reason(int(i)) for i in one] == ["read by hand", "meets the input"]
