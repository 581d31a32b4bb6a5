"""Custom models of any shape and conditioning: the runtime's samples are torch's, from loading to int8 bundles.

The reference is torch: the checkpoint's own network, or its fake-quantized copy, under the same sampler and plan.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffpress as dp
from diffpress.cli.main import main
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.evaluation.metrics import mean_sqnr_db
from diffpress.compress.models.components import DECODER, load_component
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.recipe import Recipe
from diffpress.compress.sources.load import load_checkpoint
from diffpress.export.run import run_recipe
from diffpress.runtime.denoiser import make_predictor
from diffpress.runtime.fused import fused_only, step_by_step
from diffpress.runtime.network_inputs import tensor_conditioning
from diffpress.runtime.noise_schedule import noise_level_at
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import OutputCorrection
from tests.custom_models import FILES, SHAPES, conditioning, custom_model, write_data

pytest.importorskip("openvino")
ENGINES = ("openvino", "onnxruntime")
COUNT = 4
EXACT_DB = 90.0
INT8_DB = 40.0  # engines round ties of the last bit differently


def torch_samples(checkpoint: Checkpoint, name: str, quantized: bool = False) -> np.ndarray:
    """What the runtime should return for seeds 0 to 3, computed by torch; latents are decoded."""
    spec = checkpoint.spec
    network = TorchNetwork(fake_quantized(checkpoint) if quantized else checkpoint.model, spec)
    conditions = tensor_conditioning(spec, COUNT, conditioning(name, COUNT)) if conditioning(name, 1) else None
    samples = generate(network, spec, range(COUNT), conditions=conditions)
    if checkpoint.source.decoder is None:
        return samples
    with torch.no_grad():
        latents = torch.from_numpy(samples) / spec.latent_scale + spec.latent_shift
        return checkpoint.source.decoder(latents).clamp(*spec.data_range).numpy()


def runtime_samples(bundle: Path, name: str, engine: str) -> np.ndarray:
    """The runtime's samples as arrays, pictures included."""
    with dp.Pipeline(bundle, engine) as pipe:
        conditions = pipe.conditions(COUNT, tensors=conditioning(name, COUNT) or None)
        return np.concatenate(list(pipe.images(range(COUNT), conditions)))


@pytest.mark.parametrize("name", FILES)
def test_a_float_bundle_of_any_shape_samples_what_torch_samples(name: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(custom_model(name, tmp_path))
    assert checkpoint.spec.sample_shape == SHAPES[name]
    dp.export(checkpoint, tmp_path / "bundle", targets=["onnx", "openvino"], threads=1)
    expected = torch_samples(checkpoint, name)
    for engine in ENGINES:
        assert mean_sqnr_db(expected, runtime_samples(tmp_path / "bundle", name, engine)) >= EXACT_DB


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["sequence", "upscaler"])
def test_the_command_line_samples_what_torch_samples_for_a_file_of_conditioning(
    name: str, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, bundle, file, out = custom_model(name, tmp_path), tmp_path / "b", tmp_path / "x.npz", tmp_path / "y.npy"

    def sampled(*words: object) -> str:
        out.unlink(missing_ok=True)
        code = main([str(word) for word in ("sample", bundle, "--engine", engine, "--out", out, *words)])
        output = capsys.readouterr()
        assert code == (0 if out.exists() else 2) and (out.exists() or output.err.count("\n") == 1)
        return output.err

    assert main(["export", model, "--out", str(bundle), "--targets", "onnx", "openvino", "--threads", "1"]) == 0
    capsys.readouterr()
    arrays, expected = conditioning(name, COUNT), torch_samples(load_checkpoint(model), name)
    assert sampled("--conditioning", write_arrays(file, arrays), "--batch", 3) == ""
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-5)
    # one array for all samples
    first = {key: array[0] for key, array in arrays.items()}
    assert sampled("--conditioning", write_arrays(file, first), "-n", COUNT) == ""
    assert len(np.load(out)) == COUNT
    np.testing.assert_allclose(np.load(out)[0], expected[0], rtol=0, atol=1e-5)
    key = next(iter(arrays))
    assert f"give the arrays {key} float32" in sampled() and "--conditioning FILE.npz" in sampled()
    assert f"'{key}' has {COUNT} rows for 2 samples" in sampled("--conditioning", write_arrays(file, arrays), "-n", 2)
    assert key in sampled("--conditioning", write_arrays(file, {"other": arrays[key]}))
    assert "shape" in sampled("--conditioning", write_arrays(file, {**arrays, key: arrays[key][..., :1]}))
    assert "not conditioned on text" in sampled("--prompt", "a cat")


def write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(file, allow_pickle=False, **arrays)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_distilled_int8_bundle_of_any_shape_samples_what_torch_samples(name: str, tmp_path: Path) -> None:
    data = write_data(name, tmp_path / "data.npz")
    stages = [
        dp.Trajectory(steps=4, batch=4, trajectories=8, trajectory_steps=4),
        dp.Quantize("int8", samples=8, batch=4, output_correction=False),
    ]
    small = dp.compress(custom_model(name, tmp_path), stages, out=tmp_path / "work", data=data)
    assert small.spec.plan.steps == 2 and small.quantization is not None and small.quantization.layers
    dp.export(small, tmp_path / "bundle", targets=["onnx", "openvino"], threads=1)
    expected = torch_samples(small, name, quantized=True)
    for engine in ENGINES:
        assert mean_sqnr_db(expected, runtime_samples(tmp_path / "bundle", name, engine)) >= INT8_DB


INT8 = dp.Quantize("int8", samples=8, batch=4)
STAGES: dict[str, list[Any]] = {
    "recover": [dp.Prune(method="magnitude", ratio=0.25, round_to=4), dp.Recover(steps=2, batch=4), INT8],
    "guidance": [dp.Guidance(steps=2, batch=4, weight=2.0), INT8],
    "progressive": [dp.Progressive(steps=2, batch=4, start_steps=4)],
    "consistency": [dp.Consistency(steps=2, batch=4)],
    "score": [dp.Score(steps=2, batch=4), dp.Quantize("int8", samples=8, batch=4, gptq={})],
    "gits": [dp.Schedule(steps=3, search="gits", samples=4), dp.Quantize("int8", samples=8, batch=4, smoothquant={})],
    "taylor": [dp.Prune(ratio=0.25, round_to=4, batch=4), dp.Quantize("int8", samples=8, batch=4, qat={"steps": 2})],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "name"),
    # only the policy has a null, which distilling guidance needs
    [(stages, name) for stages in STAGES for name in FILES if stages != "guidance" or name == "sequence"],
)
def test_every_kind_of_stage_runs_on_samples_of_any_shape(stages: str, name: str, tmp_path: Path) -> None:
    data = write_data(name, tmp_path / "data.npz", count=32)
    small = dp.compress(custom_model(name, tmp_path), STAGES[stages], out=tmp_path / "work", data=data)
    samples = torch_samples(small, name, quantized=small.quantization is not None)
    assert np.isfinite(samples).all() and len(small.history) == len(STAGES[stages])


@pytest.mark.parametrize("name", ["points", "sequence", "video"])
def test_fused_sampling_with_corrections_is_the_loop_for_any_shape(name: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(custom_model(name, tmp_path))
    dp.export(checkpoint, tmp_path / "bundle", targets=["onnx"], threads=1)
    spec = checkpoint.spec
    bias = tuple(0.1 * channel + 0.1 for channel in range(spec.sample_shape[0]))
    corrections = tuple(OutputCorrection(0.01 * step, bias) for step in range(spec.plan.steps))
    spec = spec.with_plan(replace(spec.plan, output_corrections=corrections))
    arrays = conditioning(name, COUNT)
    conditions = tensor_conditioning(spec, COUNT, arrays) if arrays else None
    with dp.Pipeline(tmp_path / "bundle", "openvino") as pipe:
        fused = generate(fused_only(pipe.denoiser), spec, range(COUNT), conditions=conditions)
        loop = generate(step_by_step(pipe.denoiser), spec, range(COUNT), conditions=conditions)
        plain = generate(pipe.denoiser, spec, range(COUNT), plan=spec.plan.without_corrections, conditions=conditions)
    assert mean_sqnr_db(loop, fused) > 100.0 and mean_sqnr_db(plain, fused) < 40.0


def test_samples_that_are_no_pictures_are_returned_as_arrays(tmp_path: Path) -> None:
    for name in ("points", "sequence", "video", "upscaler", "latents"):
        checkpoint = load_checkpoint(custom_model(name, tmp_path))
        dp.export(checkpoint, tmp_path / name, targets=["onnx"], threads=1)
        with dp.Pipeline(tmp_path / name) as pipe:
            samples = pipe(seeds=range(2), conditioning=conditioning(name, 2) or None)
        if name in ("upscaler", "latents"):
            size = (8, 8) if name == "upscaler" else (16, 16)
            assert [type(image) for image in samples] == [Image.Image] * 2 and samples[0].size == size
        else:
            assert isinstance(samples, np.ndarray)
            assert samples.dtype == np.float32 and samples.shape == (2, *SHAPES[name])


@pytest.mark.slow
def test_a_run_writes_pairs_of_samples_that_are_no_pictures_as_arrays(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: [{quantize: {format: int8, samples: 4, batch: 4}}]\nexport: {targets: [onnx]}\n")
    run_recipe(lambda: load_checkpoint(custom_model("sequence", tmp_path)), Recipe.load(recipe), tmp_path / "run")
    with np.load(tmp_path / "run" / "comparison.npz") as pairs:
        assert pairs["teacher"].shape == pairs["bundle"].shape == (20, 3, 8)
        assert mean_sqnr_db(pairs["teacher"], pairs["bundle"]) > 20.0
    assert not (tmp_path / "run" / "comparison.png").exists()


def test_a_model_of_latents_without_a_decoder_returns_its_latents(tmp_path: Path) -> None:
    file, _ = custom_model("latents", tmp_path).split(":")
    Path(file).write_text(FILES["latents"].replace(", Decoder()\n", "\n"))
    checkpoint = load_checkpoint(f"{file}:{tmp_path / 'latents.weights'}")
    dp.export(checkpoint, tmp_path / "bundle", targets=["onnx"], threads=1)
    with dp.Pipeline(tmp_path / "bundle") as pipe:
        assert not pipe.makes_pictures
        latents = pipe(seeds=range(COUNT))
    assert mean_sqnr_db(torch_samples(checkpoint, "latents"), np.asarray(latents)) >= EXACT_DB


def test_a_saved_latent_checkpoint_has_its_decoder_again(tmp_path: Path) -> None:
    reference = custom_model("latents", tmp_path)
    checkpoint = load_checkpoint(reference)
    stages = [dp.Prune(method="magnitude", ratio=0.25, round_to=4)]
    small = dp.compress(reference, stages, out=tmp_path / "work")
    (saved,) = (tmp_path / "work" / "stages").glob("*prune*")
    again = load_checkpoint(f"{reference.split(':')[0]}:{saved}")
    assert again.hash == small.hash != checkpoint.hash
    x = torch.randn(2, 4, 8, 8).numpy()
    before, after = (
        load_component(one, DECODER).run_all({"latent_sample": x})["sample"] for one in (checkpoint, again)
    )
    assert np.array_equal(before, after)


def test_guidance_uses_the_null_of_each_tensor_and_keeps_the_others(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(custom_model("sequence", tmp_path))
    spec, arrays = checkpoint.spec, conditioning("sequence", COUNT)
    found = tensor_conditioning(spec, COUNT, arrays)
    assert found.uncond is not None
    assert not found.uncond["observation"].any() and (found.uncond["task"] == 4).all()
    weight, x, t = spec.plan.guidance, torch.randn(COUNT, 3, 8), torch.full((COUNT,), 99)
    model, tensors = checkpoint.model, {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        cond = model(x, t, **tensors)
        uncond = model(x, t, observation=torch.zeros(COUNT, 2, 5), task=torch.full((COUNT,), 4))
    predict = make_predictor(TorchNetwork(model, spec), spec, conditions=found, guidance=weight)
    out = predict(x.numpy(), noise_level_at(spec.schedule, 99.0))
    assert np.allclose(out, (uncond + weight * (cond - uncond)).numpy(), atol=1e-6)
