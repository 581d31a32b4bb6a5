"""A bundle whose plan has cached steps: int8 graphs from one calibration, in both engines, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint, Source
from diffpress.compress.config import EvaluateConfig, ExportConfig
from diffpress.compress.context import Context
from diffpress.compress.evaluation.evaluate import paired
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.evaluation.subject import pipeline_subject
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.pruning.config import PruneDepthConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.compress.sampling_schedule.schedule import schedule
from diffpress.export.bundle import export_bundle
from diffpress.export.comparison import sample_pairs
from diffpress.export.denoiser import check_cached_steps
from diffpress.export.targets.engine_cost import open_engine_costs
from diffpress.export.verify.reference import parity_case_for
from diffpress.runtime.bundle import MANIFEST, Bundle, load_bundle, manifest_hash
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.engines import available, open_engine
from diffpress.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError
from diffpress.runtime.network_inputs import dummy_inputs
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

ENGINES = [name for name in available() if name != "tensorrt"]
CACHE = StepCache("features", ("full", "cached", "cached", "full", "cached"), cut="up_blocks.1")


def checkpoint() -> Checkpoint:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32)}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model: Any = UNet2DModel(**sizes, **kinds, layers_per_block=1, norm_num_groups=4)
    model.eval()
    schedule = betas_schedule("scaled_linear", 1000, 0.00085, 0.012)
    plan = replace(make_plan("ddim", 5, schedule, spacing="trailing"), cache=CACHE)
    return Checkpoint(model, DenoiserSpec("v", schedule, (1, 8, 8), plan), Source("unet", dict(model.config)))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made = checkpoint()
    context = Context(0, tmp_path_factory.mktemp("calibration"), made)
    return quantize(made, QuantizeConfig(samples=4, batch=2, output_correction=False), context)


@pytest.fixture(scope="module")
def bundle(quantized: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("cached") / "bundle"
    return export_bundle(quantized, out, ExportConfig(targets=("onnx", "openvino"), threads=1))


def test_int8_samples_with_cached_steps_are_those_of_fake_quantization(quantized: Checkpoint, bundle: Bundle) -> None:
    expected = generate(TorchNetwork(fake_quantized(quantized), quantized.spec), quantized.spec, range(8))
    for name in ENGINES:
        with closing(open_engine(bundle, name, threads=1)) as engine:
            found = generate(engine, bundle.spec, range(8))
            plain = generate(engine, bundle.spec, range(8), plan=bundle.spec.plan.without_cache)
        assert sqnr_db(expected, found) > max(20.0, sqnr_db(expected, plain) + 3.0)
    parity = bundle.manifest["parity"]
    assert all(parity[name]["sqnr_db"] > parity["torch_fake_quant"]["sqnr_db"] - 3.0 for name in ENGINES)


def test_the_cached_int8_graph_has_the_outer_layers_alone(bundle: Bundle) -> None:
    for name in ENGINES:
        with closing(open_engine(bundle, name, threads=1)) as engine:
            split: Any = engine
            inputs = dummy_inputs(engine, bundle.spec, 2)
            _, features = split.run_full(inputs)
            held = {key: value.numpy() if name == "onnxruntime" else value.data for key, value in features.items()}
            taken = {key: array for key, array in inputs.items() if key in split.cached.inputs} | held
            whole, cached = (
                {layer for kernel in one.kernel_times(feed, 1) for layer in kernel.names}
                for one, feed in ((engine, inputs), (split.cached, taken))
            )
            share = split.cached.integer_mac_share(taken)
        assert any(layer.startswith("mid_block.") for layer in whole)
        assert not any(layer.startswith(("mid_block.", "down_blocks.1.", "up_blocks.0.")) for layer in cached)
        assert any(layer.startswith("up_blocks.1.") for layer in cached) and share > 0.5


def test_the_weights_are_stored_once(bundle: Bundle) -> None:
    entry, files = bundle.manifest["graphs"]["denoiser"]["cached"], bundle.manifest["files"]
    assert entry["file"] == "denoiser.cached.onnx" and entry["features"] == ["feature.0"]
    assert "denoiser.onnx.data" in files and "denoiser.cached.onnx.data" not in files
    assert bundle.manifest["requires"] == ["step_cache"]


def test_a_pipeline_follows_the_cache_and_can_switch_it_off(bundle: Bundle) -> None:
    with Pipeline(bundle, "onnxruntime", threads=1) as pipe:
        conditions = pipe.conditions(3)
        cached = np.concatenate(list(pipe.images(range(3), conditions)))
        off = pipe.bundle.spec.with_plan(pipe.spec.plan.without_cache)
        plain = np.concatenate(list(pipe.images(range(3), conditions, off)))
        assert len(pipe(seeds=range(3))) == 3 and len(pipe(seeds=range(3), step_cache=False)) == 3
    assert np.abs(cached - plain).max() > 1e-3


def test_a_teacher_without_the_cached_graph_is_compared_under_the_plan_without_cache(
    bundle: Bundle, tmp_path: Path
) -> None:
    made = checkpoint()
    plain = made.evolve(spec=made.spec.with_plan(made.spec.plan.without_cache))
    teacher = export_bundle(plain, tmp_path / "teacher", ExportConfig(targets=("onnx",), threads=1))
    with closing(Pipeline(bundle, "onnxruntime")) as ours, closing(Pipeline(teacher, "onnxruntime")) as theirs:
        pairs = sample_pairs(ours, theirs)
        config = EvaluateConfig(samples=8, seeds=1, batch=4)
        scores = paired(pipeline_subject(ours), pipeline_subject(theirs), config, "teacher")
    assert np.array_equal(pairs.teacher, pairs.same_plan) and not np.array_equal(pairs.teacher, pairs.bundle)
    assert np.isfinite(scores["psnr_db"])


def test_fewer_steps_of_a_parity_check_have_cached_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    made = checkpoint()
    monkeypatch.setattr("diffpress.export.verify.reference.is_large", lambda model: True)
    case = parity_case_for(made.model, made.spec)
    assert case.spec.plan.cache is not None and set(case.spec.plan.cache.steps) == {"full", "cached"}
    assert case.spec.plan.cache.cut == CACHE.cut and case.spec.plan.steps < made.spec.plan.steps


def test_removing_blocks_drops_the_cache_that_was_measured_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = checkpoint()
    smaller = prune(made, PruneDepthConfig(remove=("mid_block.resnets.0",)), Context(0, tmp_path, made))
    assert smaller.spec.plan == made.spec.plan.without_cache and "step cache" in caplog.text


def changed(bundle: Bundle, folder: Path, change: Any) -> Path:
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["graphs"]["denoiser"])
    for entry in manifest["graphs"]["denoiser"]["variants"].values():
        change(entry)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"hash": manifest_hash(manifest)}))
    return folder


def test_a_bundle_without_its_cached_graph_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = changed(bundle, tmp_path / "without", lambda entry: entry.pop("cached", None))
    with pytest.raises(InvalidInputError, match="needs a cached graph, and the bundle has none for onnxruntime"):
        open_engine(load_bundle(path), "onnxruntime")
    shutil.copytree(bundle.path, tmp_path / "deleted")
    (tmp_path / "deleted" / "denoiser.cached.onnx").unlink()
    with pytest.raises(InvalidInputError, match=r"denoiser.cached.onnx: listed in the manifest but missing"):
        load_bundle(tmp_path / "deleted")


def test_a_cached_graph_that_does_not_match_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    def change(entry: dict[str, Any]) -> None:
        if "cached" in entry:
            entry["cached"]["file"] = "denoiser.onnx"

    path = changed(bundle, tmp_path / "other", change)
    with pytest.raises(InvalidInputError, match="they do not match; export the bundle again"):
        open_engine(load_bundle(path), "onnxruntime")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": ("tensorrt",)}, "target tensorrt does not go with"),
        ({"fixed_timesteps": True}, "fixed_timesteps does not go with"),
        ({"precision": "fp16"}, "precision fp16 does not go with"),
    ],
)
def test_export_settings_that_do_not_go_with_cached_steps_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_cached_steps("features", ExportConfig(**config))


def test_a_cached_evaluation_is_timed_in_an_engine() -> None:
    with open_engine_costs(checkpoint(), "onnxruntime") as costs:
        assert 0.0 < costs.cached_latency_ratio() < 1.5


def test_an_engine_that_keeps_no_features_is_unavailable(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(OnnxRuntimeEngine, "run_keeping")
    with pytest.raises(EngineUnavailableError, match="'onnxruntime' does not run the cached graph"):
        open_engine(bundle, "onnxruntime")


@pytest.mark.parametrize("kind", ["features", "auto"])
def test_the_stage_chooses_cached_steps_by_their_time_in_an_engine(kind: str, tmp_path: Path) -> None:
    made, opened = checkpoint(), []

    @contextmanager
    def costs(timed: Checkpoint, engine: str) -> Iterator[Any]:
        assert timed.spec.plan.cache is not None
        opened.append((timed.spec.plan.cache.cut, engine))
        yield SimpleNamespace(cached_latency_ratio=lambda: 0.3)

    context = Context(0, tmp_path, made, open_engine_costs=costs)
    settings = {"kind": kind, "speedup": 1.3, "samples": 4, "refine": 0, "engine": "openvino"}
    result = schedule(made, ScheduleConfig(solver="ddim", steps=8, spacing="trailing", cache=settings), context)
    ((cut, engine),) = opened
    assert (cut, engine) == ("up_blocks.1", "openvino") and context.notes["cache"]["cached_cost"] == 0.3
    found = result.spec.plan.cache
    assert found is not None and context.notes["cache"]["kept"]
    if kind == "features":  # full + 0.3 (8 - full) <= 8 / 1.3
        assert found.counts == {"full": 5, "cached": 3} and found.cut == "up_blocks.1"


def test_without_an_engine_the_time_of_cached_steps_is_not_guessed(tmp_path: Path) -> None:
    config = ScheduleConfig(solver="ddim", steps=8, cache={"kind": "auto", "speedup": 1.3})
    with pytest.raises(InvalidInputError, match="measures its time in an engine, and none is open here"):
        schedule(checkpoint(), config, Context(0, tmp_path, checkpoint()))


def test_a_cut_that_the_model_does_not_have_is_refused_by_the_stage(tmp_path: Path) -> None:
    config = ScheduleConfig(solver="ddim", steps=8, cache={"kind": "features", "speedup": 1.3, "cut": "outer_1"})
    with pytest.raises(InvalidInputError, match=r"cut 'outer_1' is not one of up_blocks\.1"):
        schedule(checkpoint(), config, Context(0, tmp_path, checkpoint()))
