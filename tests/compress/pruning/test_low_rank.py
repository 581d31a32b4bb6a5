"""Low rank: the factors are the truncated decomposition, and layers that an engine computes faster are replaced."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import diffpress as dp
from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.distillation.recover import recover
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.counts import count
from diffpress.compress.models.kept_indices import kept_to_json
from diffpress.compress.models.low_rank_layers import LowRankLayer, full_rank, low_rank_layers
from diffpress.compress.pruning.config import PruneConfig, PruneDepthConfig, PruneLowRankConfig, PruneSparsityConfig
from diffpress.compress.pruning.low_rank import factored_layers, factors_of, singular_vectors, with_layers
from diffpress.compress.pruning.prune import prune
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.recipe import Recipe
from diffpress.compress.sources.load import load_checkpoint
from diffpress.export.targets.engine_cost import open_engine_costs
from diffpress.runtime.errors import InvalidInputError

Make = Callable[..., Checkpoint]
HALF = PruneLowRankConfig(ratio=0.7, round_to=1)
LAYERS: dict[str, Callable[[], Any]] = {
    "wide": lambda: nn.Linear(20, 12),
    "tall": lambda: nn.Linear(12, 20, bias=False),
    "square": lambda: nn.Linear(16, 16),
    "1x1": lambda: nn.Conv2d(12, 20, 1, stride=2),
    "3x3": lambda: nn.Conv2d(6, 10, 3, padding=1, stride=2, dilation=2, padding_mode="reflect", bias=False),
}


class Chain(nn.Module):
    """Layers by name between a first and a last convolution, which are sensitive; channels 16 throughout."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 16, 1)
        self.layers = nn.ModuleDict(layers)
        self.last = nn.Conv2d(16, 1, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.first(sample)
        for layer in self.layers.values():
            is_conv = isinstance(layer, nn.Conv2d) or hasattr(layer, "kernel_size")
            x = x + (layer(x) if is_conv else layer(x.movedim(1, -1)).movedim(-1, 1))
        return self.last(x)


def with_spectrum(layer: Any, values: list[float]) -> Any:
    """Give a layer the weight with these singular values."""
    matrix = layer.weight.detach().flatten(1)
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    spectrum = torch.zeros(min(matrix.shape), dtype=torch.float64)
    spectrum[: len(values)] = torch.tensor(values)
    with torch.no_grad():
        layer.weight.copy_(((left * spectrum) @ right).view_as(layer.weight))
    return layer


def factored(layer: Any, rank: int) -> LowRankLayer:
    matrix = layer.weight.detach().flatten(1).double()
    with torch.no_grad():
        return factors_of(layer, *singular_vectors(matrix), rank)


def evaluated(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return adapter_for(checkpoint.model).forward(checkpoint.model, dummy_inputs(checkpoint.spec, 2))


# --- factors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_squared_error_is_the_energy_of_the_singular_values_left_out(kind: str, rank: int) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    found = factored(layer, rank)
    values = torch.linalg.svdvals(layer.weight.detach().flatten(1).double())
    error = (layer.weight - found.weight).detach().double().square().sum()
    assert float(error) == pytest.approx(float(values[rank:].square().sum()), rel=1e-5)
    assert found.rank == rank and found.weight.shape == layer.weight.shape
    # balanced: both factors have the roots of the singular values
    for factor in (found.down.weight, found.up.weight):
        own = torch.linalg.svdvals(factor.detach().flatten(1).double())
        torch.testing.assert_close(own, values[:rank].sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_at_full_rank_the_output_is_that_of_the_whole_layer(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    found, size = factored(layer, full_rank(layer)), layer.weight.shape[1]
    x = torch.randn(2, 5, size) if isinstance(layer, nn.Linear) else torch.randn(2, size, 9, 7)
    torch.testing.assert_close(found(input=x), layer(x), rtol=0, atol=1e-5)


def test_a_weight_of_zeros_or_of_few_singular_values_is_reproduced() -> None:
    torch.manual_seed(0)
    for values in ([], [3.0, 1e-9], [2.0, 1.0]):
        layer = with_spectrum(nn.Linear(16, 24), values)
        found = factored(layer, 8)
        assert all(parameter.isfinite().all() for parameter in found.parameters())
        torch.testing.assert_close(found.weight, layer.weight, rtol=0, atol=1e-6)


def test_code_that_reads_a_layer_finds_its_attributes() -> None:
    for layer in (nn.Linear(20, 12), nn.Conv2d(12, 20, 3, stride=2, padding=1)):
        found = factored(layer, 4)
        names = [
            name for name in (*layer.__constants__, "bias", "weight") if name not in ("transposed", "padding_mode")
        ]
        for name in names:
            ours, theirs = getattr(found, name, None), getattr(layer, name, None)
            if isinstance(theirs, torch.Tensor):
                assert isinstance(ours, torch.Tensor) and ours.shape == theirs.shape, name
            elif name != "output_padding":
                assert ours == theirs, name
        assert not hasattr(found, "kernel_size") or isinstance(layer, nn.Conv2d)
        assert sorted(name for name, _ in found.named_parameters()) == ["down.weight", "up.bias", "up.weight"]


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.75, 2), (0.95, 3), (0.999, 4)])
def test_energy_keeps_the_fewest_singular_values_that_reach_it(
    energy: float, rank: int, custom: Make, context: Callable[..., Context]
) -> None:
    # squared: 16, 6.25, 2.25, 0.25 of 24.75, cumulated 0.646, 0.899, 0.990, 1
    checkpoint = custom(Chain(mix=with_spectrum(nn.Linear(16, 16), [4.0, 2.5, 1.5, 0.5])))
    small = prune(checkpoint, PruneLowRankConfig(energy=energy, round_to=1), context(checkpoint))
    assert low_rank_layers(small.model) == {"layers.mix": rank}


@pytest.mark.parametrize(
    ("ratio", "round_to", "rank"), [(0.75, 1, 4), (0.8, 1, 3), (0.95, 1, 1), (0.95, 4, 4), (0.8, 6, 6)]
)
def test_ratio_is_the_fraction_of_the_rank_removed_and_ranks_are_rounded_up(
    ratio: float, round_to: int, rank: int, custom: Make, context: Callable[..., Context]
) -> None:
    checkpoint = custom(Chain(mix=nn.Conv2d(16, 16, 1)))
    small = prune(checkpoint, PruneLowRankConfig(ratio=ratio, round_to=round_to), context(checkpoint))
    assert low_rank_layers(small.model) == {"layers.mix": rank}


def test_macs_and_parameters_fall_by_those_of_the_rank(custom: Make, context: Callable[..., Context]) -> None:
    checkpoint = custom(Chain(mix=nn.Conv2d(16, 16, 3, padding=1)))
    small = prune(checkpoint, PruneLowRankConfig(ratio=0.75, round_to=1), context(checkpoint))
    before, after = (count(one.model, one.spec) for one in (checkpoint, small))
    saved = 16 * 16 * 9 - 4 * (16 * 9 + 16)
    assert before.parameters - after.parameters == saved and before.macs - after.macs == 64 * saved


# --- families ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ldm", "sd", "sdxl", "lcm", "dit", "pixart-alpha", "sd3", "sd3.5", "flux"])
def test_every_family_is_replaced_exactly_at_full_rank_and_reloads_at_a_low_one(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = load_checkpoint(tiny_folder(kind))
    layers = factored_layers(teacher, HALF).layers
    assert len(layers) > 8 and {type(layer.down) for layer in layers.values()} <= {nn.Linear, nn.Conv2d}
    whole = {
        name: factored(layer, full_rank(layer)) for name in layers for layer in [teacher.model.get_submodule(name)]
    }
    torch.testing.assert_close(evaluated(with_layers(teacher, whole)), evaluated(teacher), rtol=0, atol=1e-4)
    small = prune(teacher, HALF, Context(0, tmp_path, teacher))
    assert low_rank_layers(small.model).keys() == layers.keys()
    save_checkpoint(small, tmp_path / "small")
    loaded = load_checkpoint(tmp_path / "small")
    assert loaded.hash == small.hash != teacher.hash and torch.equal(evaluated(loaded), evaluated(small))


FRESH = """
import sys
import torch
import diffpress as dp
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
torch.set_num_threads(1)  # as in the test: sums depend on it
checkpoint = dp.load(sys.argv[1])
with torch.no_grad():
    out = adapter_for(checkpoint.model).forward(checkpoint.model, dummy_inputs(checkpoint.spec, 2))
torch.save(out, sys.argv[2])
"""


def assert_reloads_in_a_fresh_process(checkpoint: Checkpoint, name: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-c", FRESH, name, folder / "out.pt"], check=True)
    assert torch.equal(torch.load(folder / "out.pt", weights_only=True), evaluated(checkpoint))


def test_width_then_low_rank_then_depth_reload_in_a_fresh_process_to_the_same_outputs(
    unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    narrow = prune(unet, PruneConfig(method="magnitude", ratio=0.4, round_to=4), context(unet))
    small = prune(narrow, HALF, context(unet))
    small = prune(small, PruneDepthConfig(remove=("mid_block.resnets.0", "up_blocks.0.resnets.1")), context(unet))
    ranks = low_rank_layers(small.model)
    assert {"mid_block.attentions.0.to_q", "down_blocks.1.resnets.0.conv_shortcut"} <= ranks.keys()
    assert "down_blocks.0.downsamplers.0.conv" in ranks and not any("mid_block.resnets.0" in name for name in ranks)
    save_checkpoint(small, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "diffpress.json").read_text())["low_rank_layers"] == ranks
    assert_reloads_in_a_fresh_process(small, str(tmp_path / "small"), tmp_path)

    # the indices that width pruning kept are still those of the whole weights
    loaded = load_checkpoint(tmp_path / "small")
    assert kept_to_json(loaded.kept_indices) == kept_to_json(small.kept_indices)
    kept, weight = loaded.kept_indices["mid_block.attentions.0.to_q.weight"], "mid_block.attentions.0.to_q"
    assert kept
    whole: Any = unet.model.get_submodule(weight).weight
    for dim, indices in kept.items():
        whole = whole.detach().index_select(dim, torch.from_numpy(indices))
    values = torch.linalg.svdvals(whole.detach())
    product: Any = loaded.model.get_submodule(weight).weight
    assert float(torch.dist(whole, product.detach())) == pytest.approx(
        float(values[ranks[weight] :].square().sum().sqrt()), rel=1e-3
    )


def test_a_custom_module_reloads_in_a_fresh_process_to_the_same_outputs(
    custom_files: Callable[..., tuple[Path, Path]], context: Callable[..., Context], tmp_path: Path
) -> None:
    file, weights = custom_files()
    teacher = load_checkpoint(f"{file}:{weights}")
    small = prune(teacher, HALF, context(teacher))
    assert low_rank_layers(small.model) == {"inner": 5}
    save_checkpoint(small, tmp_path / "small")
    assert_reloads_in_a_fresh_process(small, f"{file}:{tmp_path / 'small'}", tmp_path)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (["conv_in"], "low_rank_layers must be a JSON object"),
        ({"mid_block.attentions.7.to_q": 4}, "a layer 'mid_block.attentions.7.to_q' that this model does not have"),
        ({"mid_block.resnets.0": 4}, "a layer 'mid_block.resnets.0' that this model does not have"),
        ({"mid_block.attentions.0.to_q": 99}, "'mid_block.attentions.0.to_q' is 99, not a number from 1 to 32"),
        ({"mid_block.attentions.0.to_q": True}, "is True, not a number from 1 to 32"),
        ({}, "widths name a layer 'down_blocks.0.resnets.0.conv1.down'"),
    ],
)
def test_a_damaged_record_is_refused(
    record: Any, words: str, unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    save_checkpoint(prune(unet, HALF, context(unet)), tmp_path / "small")
    file = tmp_path / "small" / "diffpress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"low_rank_layers": record}))
    with pytest.raises(InvalidInputError, match=r"diffpress\.json") as caught:
        load_checkpoint(tmp_path / "small")
    assert words in str(caught.value)


def test_pruning_leaves_the_input_as_it_is(unet: Checkpoint, context: Callable[..., Context]) -> None:
    before = unet.hash
    small = prune(unet, HALF, context(unet))
    with torch.no_grad():
        for parameter in small.model.parameters():
            parameter.add_(1.0)
    assert Checkpoint(unet.model, unet.spec, unet.source).hash == before
    assert not low_rank_layers(unet.model)


# --- choice ------------------------------------------------------------------------------------------------------


class Profiler:
    """Engine costs from a table of milliseconds, so that no test depends on a machine's speed."""

    def __init__(self, before: dict[str, float], after: dict[str, float], step: float = 0.9) -> None:
        self.times, self.step, self.engines = (before, after), step, list[str]()
        self.profiled: list[Checkpoint] = []

    def layer_times_ms(self, pruned: Checkpoint) -> tuple[dict[str, float], dict[str, float]]:
        self.profiled.append(pruned)
        return self.times

    def relative_latency(self, pruned: Checkpoint) -> float:
        self.profiled.append(pruned)
        return self.step

    @contextmanager
    def opened(self, checkpoint: Checkpoint, engine: str) -> Iterator[Any]:
        self.engines.append(engine)
        yield self


def two_shapes() -> Chain:
    return Chain(one=nn.Linear(16, 16), two=nn.Linear(16, 16), three=nn.Conv2d(16, 16, 1))


def split(layer: str, down: float, up: float) -> dict[str, float]:
    return {f"layers.{layer}.down": down, f"layers.{layer}.up": up}


BEFORE = {"layers.one": 2.0, "layers.two": 2.0, "layers.three": 2.0, "first": 9.0}


def test_the_shapes_that_take_less_time_are_replaced_and_the_others_are_named(
    custom: Make, context: Callable[..., Context], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = custom(two_shapes())
    # `two` alone is slower, but what differs between layers of one shape is noise
    after = split("one", 0.5, 0.5) | split("two", 1.0, 1.1) | split("three", 1.0, 0.95)
    profiler = Profiler(BEFORE, after)
    ctx = replace(context(checkpoint), open_engine_costs=profiler.opened)
    small = prune(checkpoint, PruneLowRankConfig(ratio=0.75, round_to=1, engine="onnxruntime"), ctx)
    assert low_rank_layers(small.model) == {"layers.one": 4, "layers.two": 4}
    assert profiler.engines == ["onnxruntime"]
    assert low_rank_layers(profiler.profiled[0].model).keys() == {"layers.one", "layers.two", "layers.three"}
    assert profiler.profiled[1].hash == small.hash  # what was timed as a whole is the result
    assert "1 layers left whole: layers.three (not faster in onnxruntime)" in caplog.text
    assert ctx.notes == {
        "low_rank_rule": "less time in onnxruntime",
        "latency_fraction": 0.9,
        "low_rank_layers": {"layers.one": 4, "layers.two": 4},
        "whole_layers": {"layers.three": "not faster in onnxruntime"},
    }


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (split("one", 1, 1) | split("two", 1, 1) | split("three", 1, 0.92), "'layers.three' with rank 4, takes 0.96"),
        ({}, "is in no profile"),  # what the profile does not show is no gain
    ],
)
def test_a_model_without_a_faster_layer_is_refused_with_the_best(
    after: dict[str, float], words: str, custom: Make, context: Callable[..., Context]
) -> None:
    checkpoint = custom(two_shapes())
    ctx = replace(context(checkpoint), open_engine_costs=Profiler(BEFORE, after).opened)
    with pytest.raises(InvalidInputError, match="prune: no layer is faster in onnxruntime") as caught:
        prune(checkpoint, PruneLowRankConfig(ratio=0.75, round_to=1, engine="onnxruntime"), ctx)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_step_that_is_slower_as_a_whole_is_refused(custom: Make, context: Callable[..., Context]) -> None:
    checkpoint = custom(two_shapes())
    after = {name: 0.1 for layer in ("one", "two", "three") for name in split(layer, 0, 0)}
    ctx = replace(context(checkpoint), open_engine_costs=Profiler(BEFORE, after, step=1.1).opened)
    with pytest.raises(InvalidInputError, match=r"a step with 3 layers of low rank takes 1\.10 of its time in"):
        prune(checkpoint, PruneLowRankConfig(ratio=0.75, round_to=1, engine="openvino"), ctx)


@pytest.mark.parametrize("installed", [["tensorrt", "onnxruntime", "openvino"], ["onnxruntime"], []])
def test_the_engine_is_openvino_or_what_is_installed_or_none(
    installed: list[str], custom: Make, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.compress.pruning.low_rank.available", lambda: installed)
    checkpoint = custom(two_shapes())
    profiler = Profiler(BEFORE, {name: 0.1 for layer in ("one", "two", "three") for name in split(layer, 0, 0)})
    ctx = replace(context(checkpoint), open_engine_costs=profiler.opened)
    prune(checkpoint, HALF, ctx)
    assert profiler.engines == [name for name in ("openvino", "onnxruntime") if name in installed][:1]
    assert ("fewer MACs" in ctx.notes["low_rank_rule"]) == (not installed)


def test_without_an_engine_fewer_macs_decide_and_the_log_says_so(
    custom: Make, context: Callable[..., Context], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = custom(two_shapes())
    ctx = context(checkpoint)
    small = prune(checkpoint, HALF, ctx)
    assert len(low_rank_layers(small.model)) == 3
    assert "no engine times the layers here: they are replaced for fewer MACs, r (in + out) < in out" in caplog.text
    assert ctx.notes["low_rank_rule"] == "fewer MACs, r (in + out) < in out"
    with pytest.raises(
        InvalidInputError, match=r"prune: no layer has fewer MACs with low rank: .*rank 8 of 16 saves no"
    ):
        prune(checkpoint, PruneLowRankConfig(ratio=0.5), ctx)
    with pytest.raises(InvalidInputError, match="engine = 'openvino' is where layers are timed, and none is open here"):
        prune(checkpoint, PruneLowRankConfig(ratio=0.7, engine="openvino"), ctx)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_layer_that_is_much_smaller_is_faster_in_the_engine(
    engine: Any, custom: Make, context: Callable[..., Context]
) -> None:
    pytest.importorskip(engine)

    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.heavy = nn.Conv2d(1, 384, 1), nn.Conv2d(384, 384, 1)
            self.dense, self.last = nn.Linear(384, 384), nn.Conv2d(384, 1, 1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.heavy(torch.tanh(self.first(sample))))
            return self.last(torch.tanh(self.dense(x.movedim(1, -1))).movedim(-1, 1))

    checkpoint = custom(Heavy())
    ctx = replace(context(checkpoint), open_engine_costs=open_engine_costs)
    small = prune(checkpoint, PruneLowRankConfig(ratio=0.97, engine=engine), ctx)
    assert low_rank_layers(small.model) == {"heavy": 16, "dense": 16}
    assert ctx.notes["latency_fraction"] < 1.0


# --- layers that stay whole --------------------------------------------------------------------------------------


def test_layers_that_cannot_be_replaced_are_named(
    custom: Make, context: Callable[..., Context], caplog: pytest.LogCaptureFixture
) -> None:
    class Standardized(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.mean())

    class Named(nn.Linear):
        """A layer of which other code may read what torch's does not have."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(1, 16, 1)
            self.plain, self.own, self.named = nn.Linear(16, 16), Standardized(16, 16), Named(16, 16)
            self.normed, self.grouped = parametrizations.weight_norm(nn.Linear(16, 16)), nn.Conv2d(16, 16, 1, groups=2)
            self.tied, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
            self.other.weight = self.tied.weight
            self.twice = self.again = nn.Linear(16, 16)
            self.hooked, self.ignored = nn.Linear(16, 16), nn.Linear(16, 16)
            self.hooked.register_forward_hook(lambda module, args, output: output * 2)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
            self.last = nn.Conv2d(16, 1, 1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            x = self.grouped(self.first(sample)).flatten(2).transpose(1, 2)
            for layer in (self.plain, self.own, self.named, self.normed, self.tied, self.other, self.twice, self.again):
                x = x + torch.tanh(layer(x))
            x = self.ignored(self.hooked(x))
            x = self.encoder(x + self.attention(x, x, x)[0])
            return self.last(x.transpose(1, 2).reshape(len(sample), 16, 8, 8))

    checkpoint = custom(Mixed())
    config = PruneLowRankConfig(ratio=0.75, round_to=1, ignored_layers=("ignored",))
    small = prune(checkpoint, config, context(checkpoint))
    # torch's fast path reads the weights of the encoder's layers instead of calling them
    assert low_rank_layers(small.model) == {"plain": 4, "encoder.linear1": 4, "encoder.linear2": 4}
    for words in (
        "own (it does not use torch's forward)",
        "named, hooked (it is more than torch's layer)",
        "grouped (its channels are in groups)",
        "tied, other, twice (it is shared)",
        "normed (its weight is computed from other parameters)",
        "attention.out_proj, encoder.self_attn.out_proj (its forward is not called)",
    ):
        assert words in caplog.text, words
    whole = {
        name: factored(layer, 16)
        for name in ("plain", "encoder.linear1", "encoder.linear2")
        for layer in [checkpoint.model.get_submodule(name)]
    }
    torch.testing.assert_close(evaluated(with_layers(checkpoint, whole)), evaluated(checkpoint), rtol=0, atol=1e-5)


def test_sensitive_layers_stay_whole_and_a_pattern_without_effect_is_refused(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    config = HALF.model_copy(update={"ignored_layers": ("mid_block", "*.to_q")})
    small = prune(unet, config, context(unet))
    ranks = low_rank_layers(small.model)
    assert ranks and not any(name.startswith("mid_block") or name.endswith("to_q") for name in ranks)
    assert not ranks.keys() & set(adapter_for(unet.model).sensitive_layers(unet.model))
    with pytest.raises(InvalidInputError, match=r"prune: ignored_layers: no layer name .* 'mid_blok'; similar"):
        prune(unet, PruneLowRankConfig(ratio=0.7, ignored_layers=("mid_blok",)), context(unet))


# --- settings and order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{kind: low_rank}", "exactly one of energy (the fraction of the squared singular values kept) and ratio"),
        ("{kind: low_rank, energy: 0.9, ratio: 0.5}", "chooses the ranks, found both"),
        ("{kind: low_rank, energy: 1.0}", "prune.energy: Input should be less than 1, found 1.0"),
        ("{kind: low_rank, ratio: 0}", "prune.ratio: Input should be greater than 0, found 0"),
        ("{kind: low_rank, ratio: 0.5, round_to: 0}", "prune.round_to"),
        ("{kind: low_rank, ratio: 0.5, rank: 8}", "unknown key 'stages[0].prune.rank'"),
        ("{kind: low_rank, ratio: 0.5, engine: tensorrt}", "prune.engine"),
        ("{kind: lowrank, ratio: 0.5}", "prune: kind 'lowrank': did you mean 'low_rank'?"),
    ],
)
def test_wrong_settings_are_refused_with_the_path(settings: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"stages:\n  - prune: {settings}\n")
    with pytest.raises(InvalidInputError) as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


LOW, WIDTH, SPARSE = dp.PruneLowRank(ratio=0.7), dp.Prune(method="magnitude", ratio=0.3), dp.PruneSparsity()


def test_widths_are_pruned_before_and_sparsity_after_low_rank() -> None:
    Recipe.of([WIDTH, LOW, dp.PruneDepth(blocks=1), SPARSE, dp.Recover(), dp.Quantize()])
    with pytest.raises(InvalidInputError, match=r"cannot come after prune: \{kind: low_rank\}: its groups"):
        Recipe.of([LOW, WIDTH])
    with pytest.raises(InvalidInputError, match=r"cannot come after prune: \{kind: sparsity\}: the factors"):
        Recipe.of([SPARSE, LOW])


def test_a_loaded_checkpoint_of_low_rank_is_not_pruned_in_width(
    unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    save_checkpoint(prune(unet, HALF, context(unet)), tmp_path / "small")
    loaded = load_checkpoint(tmp_path / "small")
    with pytest.raises(InvalidInputError, match=r"cannot come after prune: \{kind: low_rank\}"):
        dp.compress(loaded, [WIDTH], out=tmp_path / "work")


def test_factors_are_not_factored_again(
    unet: Checkpoint, context: Callable[..., Context], caplog: pytest.LogCaptureFixture
) -> None:
    first = HALF.model_copy(update={"ignored_layers": ("mid_block",)})
    once = prune(unet, first, context(unet))
    twice = prune(once, HALF, context(unet))
    assert low_rank_layers(twice.model).keys() > low_rank_layers(once.model).keys()
    assert all("mid_block" in name for name in low_rank_layers(twice.model).keys() - low_rank_layers(once.model).keys())
    with pytest.raises(InvalidInputError, match="it is a factor of a layer of low rank"):
        prune(twice, HALF, context(unet))


# --- later stages ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(unet: Checkpoint, context: Callable[..., Context]) -> Checkpoint:
    return prune(unet, HALF, context(unet))


def test_recovery_and_qat_train_the_factors(
    small: Checkpoint, unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    trained = recover(small, RecoverConfig(steps=3, batch=4, learning_rate=1e-2, warmup=1), context(unet))
    name = "mid_block.attentions.0.to_q"
    for factor in ("down", "up"):
        weight = f"{name}.{factor}.weight"
        assert not torch.equal(trained.model.state_dict()[weight], small.model.state_dict()[weight])
    qat = {"steps": 2, "trajectories": 4, "learning_rate": 1e-2}
    rounded = quantize(trained, QuantizeConfig(samples=4, batch=4, qat=qat), context(unet))
    assert rounded.quantization is not None
    assert {f"{name}.down", f"{name}.up"} <= set(rounded.quantization.layers)
    save_checkpoint(rounded, tmp_path / "rounded")
    assert load_checkpoint(tmp_path / "rounded").hash == rounded.hash
    assert low_rank_layers(rounded.model) == low_rank_layers(small.model)


def test_a_factor_becomes_sparse_where_its_widths_allow_it(
    custom: Make, context: Callable[..., Context], tmp_path: Path
) -> None:
    checkpoint = custom(Chain(mix=nn.Conv2d(16, 16, 3, padding=1)))
    low = prune(checkpoint, PruneLowRankConfig(ratio=0.5), context(checkpoint))
    sparse = prune(low, PruneSparsityConfig(), context(checkpoint))
    assert sparse.sparse_layers == ("layers.mix.down",)
    assert (sparse.model.state_dict()["layers.mix.down.weight"] != 0).float().mean() == 0.5
