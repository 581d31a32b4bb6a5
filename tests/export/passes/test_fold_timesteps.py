"""export/passes/fold_timesteps.py: same outputs at the plan's timesteps, NaN at any other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization, Source
from diffpress.compress.config import ExportConfig
from diffpress.compress.models.widths import widths_of
from diffpress.export.denoiser import lower_denoiser
from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.passes.fold_timesteps import fold_timesteps
from diffpress.runtime.engines import available, load_engine, open_engine
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import dummy_conditioning, typed_timesteps
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec
from tests.export.oracle import exported

FIXED = ExportConfig(fixed_timesteps=True)
SCHEDULE = betas_schedule("linear", 100)


@pytest.fixture(scope="module")
def plain_graph(plain: Checkpoint) -> Graph:
    return to_onnx(plain.model, plain.spec)


def layers(graph: Graph) -> set[str]:
    return {node.name for node in graph.proto.graph.node}


def outputs(graph: Graph, checkpoint: Checkpoint, timesteps: list[float], engine: str, folder: Path) -> np.ndarray:
    """Return the graph's output for a batch of these timesteps, each with another sample."""
    save_graph(graph, folder / "graph.onnx")
    count = len(timesteps)
    with closing(load_engine(folder / "graph.onnx", engine, 1)) as network:
        noise = np.random.default_rng(0).standard_normal((count, *checkpoint.spec.sample_shape), dtype=np.float32)
        cond = dummy_conditioning(checkpoint.spec, count).cond
        return network.run(
            {"sample": noise, "timestep": typed_timesteps(timesteps, network.inputs["timestep"]), **cond}
        )


@pytest.mark.parametrize(
    ("name", "engine"),
    [("plain", "onnxruntime"), ("unet", "onnxruntime"), *(("everything", engine) for engine in available())],
)
def test_known_timesteps_give_the_same_output_and_all_others_nan(
    name: str, engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint, graph = request.getfixturevalue(name), request.getfixturevalue(f"{name}_graph")
    known = [40.0, 7.0, 0.0, 31.0]
    folded = fold_timesteps(graph, known)
    expected, found = (outputs(g, checkpoint, [7, 40, 40, 31, 0, 7], engine, tmp_path) for g in (graph, folded))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    mixed = outputs(folded, checkpoint, [7, 8, 40, -1, 0, 41], engine, tmp_path)
    assert np.isnan(mixed[[1, 3, 5]]).all() and not np.isnan(mixed[[0, 2, 4]]).any()


def test_tables_replace_everything_that_depends_on_the_timestep_alone(
    plain_graph: Graph, unet_graph: Graph, everything_graph: Graph
) -> None:
    removed = layers(plain_graph) - layers(fold_timesteps(plain_graph, [1.0, 2.0]))
    blocks = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    projections = {f"{block}.resnets.0.time_emb_proj" for block in blocks}
    assert {"time_embedding.linear_1", "time_embedding.linear_2", *projections} <= removed
    # if classes are added to the embedding, the projections depend on both
    removed = layers(unet_graph) - layers(fold_timesteps(unet_graph, [1.0, 2.0]))
    assert {"time_embedding.linear_1", "time_embedding.linear_2"} <= removed and not removed & projections
    removed = layers(everything_graph) - layers(fold_timesteps(everything_graph, [1.0, 2.0]))
    assert {"embedding", "gemm"} <= removed and "matmul" not in removed


def test_folded_layers_are_removed_from_the_file(plain: Checkpoint, plain_graph: Graph, tmp_path: Path) -> None:
    graph = plain_graph
    folded = fold_timesteps(graph, plain.spec.plan.timesteps)
    names = {tensor.name for tensor in load_all(folded).graph.initializer}
    assert not any("time_emb" in name and name.endswith((".weight", ".bias")) for name in names)
    assert any("time_emb" in tensor.name for tensor in graph.proto.graph.initializer)  # the input is not changed
    assert save_graph(folded, tmp_path / "folded.onnx") < save_graph(graph, tmp_path / "plain.onnx")


class Added(nn.Module):
    """A projection of the timestep of size `wide` and a small one, from one embedding."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.first, self.wide, self.small = nn.Linear(4, 64), nn.Linear(64, wide), nn.Linear(64, 8)
        self.last = nn.Conv2d(1, wide, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = torch.tanh(self.first(timestep[:, None] / torch.tensor([1.0, 3.0, 9.0, 27.0])))
        x = self.last(sample) + self.wide(time)[:, :, None, None]
        return x.mean(1, keepdim=True) + self.small(time)[:, :1, None, None]


def added(wide: int) -> Checkpoint:
    torch.manual_seed(3)
    model = Added(wide).eval()
    spec = DenoiserSpec("v", SCHEDULE, (1, 4, 4), make_plan("ddim", 4, SCHEDULE))
    return Checkpoint(model, spec, Source("custom", original=widths_of(model)))


@pytest.mark.parametrize(
    ("steps", "removed"), [(12, {"first", "wide", "small"}), (40, {"first", "small"}), (300, {"small"})]
)
def test_a_table_larger_than_the_weights_it_saves_is_not_created(steps: int, removed: set[str], tmp_path: Path) -> None:
    """A row of `wide` has 4 * 2048 bytes and saves 65 * 2048 weights; tables up to 64 KiB are exempt."""
    checkpoint = added(2048)
    graph = to_onnx(checkpoint.model, checkpoint.spec)
    known = [float(t) for t in range(steps)]
    folded = fold_timesteps(graph, known)
    assert {"first", "wide", "small"} & (layers(graph) - layers(folded)) == removed
    times = [3.0, 11.0, 0.0]
    expected, found = (outputs(g, checkpoint, times, "onnxruntime", tmp_path) for g in (graph, folded))
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Batched(nn.Module):
    """Time embedding that depends on the whole batch: no row belongs to one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.last = nn.Linear(1, 8), nn.Conv2d(1, 1, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = self.time(timestep[:, None].float() - timestep.float().mean())
        return self.last(sample) + time[:, :1, None, None]


def test_outputs_that_depend_on_the_whole_batch_are_not_folded(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(4)
    model = Batched().eval()
    spec = DenoiserSpec("v", SCHEDULE, (1, 4, 4), make_plan("ddim", 4, SCHEDULE))
    checkpoint = Checkpoint(model, spec, Source("custom", original=widths_of(model)))
    graph = to_onnx(checkpoint.model, checkpoint.spec)
    assert fold_timesteps(graph, [1.0, 5.0]) is graph
    denoiser = lower_denoiser(checkpoint, FIXED, graph)
    assert denoiser.checkpoint is checkpoint and denoiser.float_graph is graph
    assert "no layer depends on the timestep alone" in caplog.text


# --- with quantization, and in a bundle ------------------------------------------------------------------------


def test_a_quantized_folded_graph_matches_fake_quantization_without_the_folded_layers(
    plain: Checkpoint,
    plain_graph: Graph,
    scales: Callable[..., Quantization],
    fake_quant: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    time_layers = ("time_embedding.linear_1", "time_embedding.linear_2")
    quantized = plain.evolve(quantization=scales(plain, weight_only=time_layers, weight_range=2.0))
    denoiser = lower_denoiser(quantized, FIXED, plain_graph)
    fixed = denoiser.checkpoint
    assert quantized.quantization is not None and fixed.quantization is not None
    left = fixed.quantization.layers
    assert set(quantized.quantization.layers) - set(left) >= set(time_layers) and len(left) > 20
    assert not any("time_emb" in key for key in fixed.quantization.amax) and quantized.quantization.layers != left
    graph = denoiser.portable.graph
    timesteps = list(plain.spec.plan.timesteps)
    found = outputs(graph, fixed, timesteps, "onnxruntime", tmp_path)
    noise = np.random.default_rng(0).standard_normal(found.shape, dtype=np.float32)
    inputs = {"sample": noise, "timestep": np.array(timesteps, np.int64)}
    expected = fake_quant(fixed, fixed.quantization, inputs)
    # a value halfway between two integers may round either way
    assert np.abs(found - expected).mean() < 0.01 * np.abs(expected).mean()


def test_a_bundle_with_fixed_timesteps_samples_its_plan_and_rejects_other_timesteps(
    plain: Checkpoint, plain_graph: Graph, tmp_path: Path
) -> None:
    bundle = exported(plain, tmp_path / "bundle", float_graph=plain_graph, fixed_timesteps=True)
    timesteps = plain.spec.plan.timesteps
    assert (
        bundle.manifest["graphs"]["denoiser"]["timesteps"] == list(timesteps)
        and bundle.spec.fixed_timesteps == timesteps
    )
    usual = exported(plain, tmp_path / "usual", float_graph=plain_graph)
    assert "timesteps" not in usual.manifest["graphs"]["denoiser"] and usual.spec.fixed_timesteps == ()
    engines = [open_engine(it, "onnxruntime", 1) for it in (bundle, usual)]
    with closing(engines[0]) as ours, closing(engines[1]) as theirs:
        expected, found = (generate(e, b.spec, range(3)) for e, b in ((theirs, usual), (ours, bundle)))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        # any solver may use these timesteps, even one that evaluates one of them twice
        for plan in (replace(plain.spec.plan, solver="plms"), plain.spec.plan.over(timesteps[1:3])):
            assert np.isfinite(generate(ours, bundle.spec, range(2), plan=plan)).all()
        other = make_plan("ddim", 5, SCHEDULE)
        with pytest.raises(
            InvalidInputError, match=r"timestep \d+ is not one of the 4 .* without --fixed-timesteps"
        ) as caught:
            generate(ours, bundle.spec, range(2), plan=other)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidInputError, match="not one of the 4"):
        bundle.spec.with_plan(other)


def test_a_solver_that_evaluates_between_the_timesteps_is_rejected_before_any_work(
    plain: Checkpoint, plain_graph: Graph
) -> None:
    spec = plain.spec
    between = plain.evolve(spec=spec.with_plan(make_plan("dpmpp_sde", 4, spec.schedule)))
    with pytest.raises(
        InvalidInputError, match="solver dpmpp_sde also evaluates the network between the plan's timesteps"
    ):
        lower_denoiser(between, FIXED)  # not traced yet
    heun = plain.evolve(
        spec=spec.with_plan(make_plan("heun", 4, spec.schedule))
    )  # two evaluations, but only at its timesteps
    denoiser = lower_denoiser(heun, FIXED, plain_graph)
    assert denoiser.checkpoint.spec.fixed_timesteps == heun.spec.plan.timesteps
