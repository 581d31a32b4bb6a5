"""Sparsity: two of every four inputs are zero, the larger ones stay, and training and export keep the pattern."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import diffpress as dp
from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.config import ExportConfig
from diffpress.compress.context import Context
from diffpress.compress.distillation.config import RecoverConfig, ScoreConfig
from diffpress.compress.distillation.recover import recover
from diffpress.compress.distillation.score import score
from diffpress.compress.pruning.config import PruneDepthConfig, PruneSparsityConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.recipe import Recipe
from diffpress.compress.sources.load import load_checkpoint
from diffpress.export.bundle import export_bundle
from diffpress.export.denoiser import lower_denoiser
from diffpress.export.graph.model import Graph, load_all
from diffpress.export.verify.sparsity import check_sparsity
from diffpress.runtime.errors import InvalidInputError


def largest_two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """Zero the two smallest of every four consecutive input channels, one group after the other."""
    result = weight.detach().clone()
    flat = result.movedim(1, -1).reshape(-1, weight.shape[1])
    for row in flat:
        for start in range(0, len(row), 4):
            smallest = row[start : start + 4].abs().argsort()[:2]
            row[start + smallest] = 0.0
    return flat.reshape(result.movedim(1, -1).shape).movedim(-1, 1)


def assert_pattern(checkpoint: Checkpoint) -> None:
    assert checkpoint.sparse_layers
    for name in checkpoint.sparse_layers:
        weight: Any = checkpoint.model.get_submodule(name).weight
        groups = (weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
        assert (groups <= 2).all(), name


@pytest.fixture
def sparse(unet: Checkpoint, context: Callable[..., Context]) -> Checkpoint:
    return prune(unet, PruneSparsityConfig(), context(unet))


def test_the_two_largest_of_four_inputs_stay(sparse: Checkpoint, unet: Checkpoint) -> None:
    before, after = unet.model.state_dict(), sparse.model.state_dict()
    names = {f"{layer}.weight" for layer in sparse.sparse_layers}
    assert {"mid_block.resnets.0.conv1.weight", "mid_block.attentions.0.to_q.weight"} <= names
    for name, value in before.items():
        assert torch.equal(after[name], largest_two_of_four(value) if name in names else value), name


def test_sensitive_ignored_and_narrow_layers_stay_dense_and_are_named(
    custom: Callable[..., Checkpoint], context: Callable[..., Context], caplog: pytest.LogCaptureFixture
) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.narrow = nn.Conv2d(1, 24, 1), nn.Conv2d(24, 32, 1)
            self.wide, self.kept, self.last = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 1, 1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.last(self.kept(torch.tanh(self.wide(torch.tanh(self.narrow(self.first(sample)))))))

    checkpoint = custom(Chain())
    found = prune(checkpoint, PruneSparsityConfig(ignored_layers=("kept",)), context(checkpoint))
    assert found.sparse_layers == ("wide",)
    assert "left dense: narrow (widths are not multiples of 8 out and 16 in)" in caplog.text


def test_sparsegpt_keeps_what_the_output_needs(
    custom: Callable[..., Checkpoint], context: Callable[..., Context], tmp_path: Path
) -> None:
    class Scaled(nn.Module):
        """Of every four channels two are ten times larger, and are read by weights half as large."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.mix = nn.Conv2d(1, 16, 5, padding=2), nn.Conv2d(16, 16, 1, bias=False)
            self.last = nn.Conv2d(16, 1, 1)
            with torch.no_grad():
                scale = torch.tensor([10.0, 10.0, 1.0, 1.0] * 4)
                self.first.weight.mul_(scale[:, None, None, None])
                weights = torch.where(scale > 1, 0.5, 1.0) * torch.randn(16, 16).sign()
                self.mix.weight.copy_(weights[:, :, None, None])

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.last(self.mix(self.first(sample)))

    checkpoint = custom(Scaled())
    by_size = prune(checkpoint, PruneSparsityConfig(), context(checkpoint, data=False))
    by_error = prune(checkpoint, PruneSparsityConfig(method="sparsegpt", samples=2), context(checkpoint, data=False))
    large = torch.tensor([True, True, False, False] * 4)
    small_weights, needed = (one.model.state_dict()["mix.weight"][:, :, 0, 0] != 0 for one in (by_size, by_error))
    assert not small_weights[:, large].any() and small_weights[:, ~large].all()  # the larger weights, for no use
    assert needed[:, large].float().mean() > 0.9
    assert_pattern(by_error)


def test_layers_that_do_not_run_as_torch_defines_them_stay_dense(
    custom: Callable[..., Checkpoint], context: Callable[..., Context], caplog: pytest.LogCaptureFixture
) -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.mean())

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.plain = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
            self.own, self.normed = Standardized(16, 16, 1), parametrizations.weight_norm(nn.Conv2d(16, 16, 1))
            self.cells, self.grouped = nn.Linear(16, 16), nn.Conv2d(32, 16, 1, groups=2)
            self.attention, self.last = nn.MultiheadAttention(16, 2, batch_first=True), nn.Conv2d(16, 1, 1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            x = self.normed(self.own(self.plain(self.first(sample))))
            x = self.grouped(torch.cat([x, self.cells(x.movedim(1, -1)).movedim(-1, 1)], 1))
            tokens = x.flatten(2).transpose(1, 2)
            return self.last((tokens + self.attention(tokens, tokens, tokens)[0]).transpose(1, 2).view_as(x))

    torch.manual_seed(0)
    mixed: Any = Mixed()
    checkpoint = custom(mixed.to(memory_format=torch.channels_last))
    small = prune(checkpoint, PruneSparsityConfig(method="sparsegpt", samples=1), context(checkpoint, data=False))
    assert small.sparse_layers == ("cells", "grouped", "plain")
    assert_pattern(small)
    for name in small.sparse_layers:
        assert (small.model.state_dict()[f"{name}.weight"] != 0).float().mean() == 0.5  # not more than the pattern
    before, after = checkpoint.model.state_dict(), small.model.state_dict()
    assert torch.equal(before["attention.out_proj.weight"], after["attention.out_proj.weight"])
    for words in ("own (it does not use torch's forward)", "attention.out_proj (its forward is not called)"):
        assert words in caplog.text


def test_recovery_quantization_and_qat_keep_the_zeros(
    sparse: Checkpoint, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    trained = recover(sparse, RecoverConfig(steps=3, batch=4, learning_rate=1e-2, warmup=1), context(unet))
    assert_pattern(trained)
    weight = "mid_block.resnets.0.conv1.weight"
    assert not torch.equal(trained.model.state_dict()[weight], sparse.model.state_dict()[weight])
    rounded = quantize(
        trained,
        QuantizeConfig(
            samples=4, batch=4, qat={"steps": 2, "trajectories": 4, "learning_rate": 1e-2, "updates": "full"}
        ),
        context(unet),
    )
    assert_pattern(rounded)


@pytest.mark.parametrize(
    "method", [{"gptq": {"samples": 2}}, {"svdquant": {"rank": 2}}, {"qat": {"updates": "low_rank", "steps": 1}}]
)
def test_methods_that_fill_zeros_are_refused(
    method: dict[str, Any], sparse: Checkpoint, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    with pytest.raises(InvalidInputError, match=r"changes the weights that are zero in the .* 2:4 sparse"):
        quantize(sparse, QuantizeConfig(format="w4a8", samples=2, **method), context(unet))


def test_a_sparse_checkpoint_reloads_and_loses_the_layers_of_a_removed_block(
    sparse: Checkpoint, unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    shallow = prune(sparse, PruneDepthConfig(remove=("mid_block.resnets.0",)), context(unet))
    assert set(sparse.sparse_layers) - set(shallow.sparse_layers) == {
        f"mid_block.resnets.0.{conv}" for conv in ("conv1", "conv2")
    }
    save_checkpoint(shallow, tmp_path / "sparse")
    loaded = load_checkpoint(tmp_path / "sparse")
    assert loaded.sparse_layers == shallow.sparse_layers and loaded.hash == shallow.hash
    file = tmp_path / "sparse" / "diffpress.json"
    for names, words in ((["mid_block.conv9"], "'mid_block.conv9', which is no layer"), ("conv_in", "must be a list")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sparse_layers": names}))
        with pytest.raises(InvalidInputError, match=words):
            load_checkpoint(tmp_path / "sparse")


def test_width_cannot_be_pruned_after_sparsity(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("stages:\n  - prune: {kind: sparsity}\n  - prune: {ratio: 0.3}\n")
    with pytest.raises(InvalidInputError, match=r"cannot come after prune: \{kind: sparsity\}: removing"):
        Recipe.load(tmp_path / "r.yaml")


def test_a_loaded_sparse_checkpoint_is_not_pruned_in_width(sparse: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot come after prune: \{kind: sparsity\}"):
        dp.compress(sparse, [dp.Prune(method="magnitude", ratio=0.3)], out=tmp_path / "work")


def test_a_few_step_student_keeps_the_zeros(
    sparse: Checkpoint, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    config = ScoreConfig(steps=4, batch=2, samples=4, learning_rate=1e-2, warmup=0, score_steps=1)
    student = score(sparse, config, context(unet))
    assert_pattern(student)
    weight = "mid_block.resnets.0.conv1.weight"
    assert not torch.equal(student.model.state_dict()[weight], sparse.model.state_dict()[weight])


def test_patterns_and_models_without_effect_are_refused(
    unet: Checkpoint, custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    with pytest.raises(InvalidInputError, match=r"prune: ignored_layers: no layer name .* 'mid_blok'; similar"):
        prune(unet, PruneSparsityConfig(ignored_layers=("mid_blok",)), context(unet))

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Conv2d(1, 12, 1), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 1, 1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.last(self.middle(self.first(sample)))

    narrow = custom(Narrow())
    with pytest.raises(InvalidInputError, match=r"no layer can be 2:4 sparse: middle \(widths are not multiples"):
        prune(narrow, PruneSparsityConfig(), context(narrow))


# --- export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "int8", "w4a8", "int4"])
def test_the_exported_weights_keep_the_pattern(
    form: Any, sparse: Checkpoint, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    checkpoint = (
        sparse if form is None else quantize(sparse, QuantizeConfig(format=form, samples=2, batch=2), context(unet))
    )
    graph = lower_denoiser(checkpoint, ExportConfig(targets=("onnx",))).portable.graph
    assert check_sparsity(graph, sparse.sparse_layers, "denoiser.onnx") == sparse.sparse_layers


def test_a_layer_that_lost_the_pattern_is_named(sparse: Checkpoint) -> None:
    graph = lower_denoiser(sparse, ExportConfig(targets=("onnx",))).portable.graph
    with torch.no_grad():
        sparse.model.state_dict()["mid_block.attentions.0.to_q.weight"].fill_(1.0)
    with pytest.raises(InvalidInputError, match=r"layer 'mid_block\.attentions\.0\.to_q' is no longer 2:4 sparse"):
        check_sparsity(Graph(load_all(graph)), sparse.sparse_layers, "denoiser.onnx")


def test_the_manifest_lists_sparse_layers(sparse: Checkpoint, tmp_path: Path) -> None:
    bundle = export_bundle(sparse, tmp_path / "bundle", ExportConfig(targets=("onnx",), threads=1))
    assert bundle.manifest["graphs"]["denoiser"]["sparse_layers"] == list(sparse.sparse_layers)
