"""compress/quantization/algorithms/qat.py: training recovers quality lost by quantization."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.distillation.distill import distill
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.adapter import dummy_inputs
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.algorithms.qat_updates import Scaling, follow_, weight_scalings, weights_of
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.trajectory_dataset import States, TrajectoryDataset
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.sample_data import SampleData
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import generate
from tests.compress.quantization.scales import scales_of

PTQ: dict[str, Any] = {"samples": 4, "batch": 4}
QAT: dict[str, Any] = {"steps": 5, "trajectories": 4, "learning_rate": 1e-3, "warmup": 1, "save_every": 2}


def config(qat: dict[str, Any] | None = None, **settings: Any) -> QuantizeConfig:
    return QuantizeConfig(**{**PTQ, "qat": {**QAT, **(qat or {})}, **settings})


@pytest.fixture
def small(custom_files: Callable[..., tuple[Path, Path]]) -> Checkpoint:
    """A small custom module: first, time, norm, inner, last; `inner` computes in int8."""
    file, weights = custom_files("v")
    return load_checkpoint(f"{file}:{weights}")


# --- quality ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(unet: Checkpoint, images: SampleData, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny U-Net after a short training on stripes and checkerboards, so that its samples have structure."""
    recover = RecoverConfig(
        steps=60, batch=16, learning_rate=3e-3, output_weight=0.0, feature_weight=0.0, task_weight=1.0, save_every=1000
    )
    return distill(unet, recover, Context(0, tmp_path_factory.mktemp("work"), unet, images))


def samples(checkpoint: Checkpoint) -> np.ndarray:
    network = TorchNetwork(fake_quantized(checkpoint), checkpoint.spec)
    return generate(network, checkpoint.spec, range(16), batch=16)


# settings of the stage, and of its training
COARSE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clipped activations": ({"calibration": {"percentile": 95.0}}, {}),
    "w4a8": ({"format": "w4a8"}, {}),
    "w4a8 by factors": ({"format": "w4a8"}, {"updates": "low_rank", "rank": 4, "learning_rate": 1e-3}),
    "int4": ({"format": "int4"}, {}),
    "fp8": ({"format": "fp8", "calibration": {"percentile": 95.0}}, {}),
    "everything in int8": ({"keep_sensitive_layers": False, "calibration": {"percentile": 99.0}}, {}),
}


@pytest.mark.parametrize(
    "coarse", [pytest.param(name, marks=[] if "w4a8" in name else pytest.mark.slow) for name in COARSE]
)
def test_training_through_the_quantizers_brings_samples_closer_to_the_float_models(
    coarse: str, trained: Checkpoint, context: Callable[..., Context]
) -> None:
    settings, training = {"output_correction": False, **COARSE[coarse][0]}, COARSE[coarse][1]
    exact, ctx = samples(trained), context(trained)
    before = sqnr_db(exact, samples(quantize(trained, QuantizeConfig(**PTQ, **settings), ctx)))
    training = {"steps": 40, "trajectories": 16, "learning_rate": 3e-4, "save_every": 1000, **training}
    after = sqnr_db(exact, samples(quantize(trained, config(training, **{"batch": 8, **settings}), ctx)))
    gain = 1.5 if "format" in settings else 0.7  # 8-bit weights lose less
    assert after > before + gain  # on seeds not used for calibration and training


def test_no_images_are_needed_and_the_same_seed_gives_the_same_hash(
    small: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    hashes = []
    for run, seed in enumerate((1, 1, 2)):
        ctx = replace(context(small, seed=seed, data=False), work=tmp_path / str(run))
        hashes.append(quantize(small, config(), ctx).hash)
    assert hashes[0] == hashes[1] != hashes[2]


class KilledError(Exception):
    pass


@pytest.mark.parametrize(("step", "updates"), [(1, "full"), (3, "full"), (3, "low_rank")])
def test_a_killed_run_resumes_from_its_last_save_with_a_bit_identical_result(
    step: int,
    updates: str,
    small: Checkpoint,
    context: Callable[..., Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config({"updates": updates})
    undisturbed = quantize(small, settings, replace(context(small), work=tmp_path / "other"))
    drawn: list[int] = []

    draw = TrajectoryDataset.draw

    def counting(*arguments: Any, **options: Any) -> States:
        drawn.append(1)
        return draw(*arguments, **options)

    def killing(*arguments: Any, **options: Any) -> States:
        if len(drawn) == step + 1:  # the first draw measures the SQNR
            raise KilledError
        return counting(*arguments, **options)

    monkeypatch.setattr(TrajectoryDataset, "draw", killing)
    with pytest.raises(KilledError):
        quantize(small, settings, context(small))
    drawn.clear()
    monkeypatch.setattr(TrajectoryDataset, "draw", counting)
    assert quantize(small, settings, context(small)).hash == undisturbed.hash
    # the steps that were not saved, and one draw for the states on which the SQNR is measured
    assert len(drawn) == 5 - (step // 2) * 2 + 1


def test_the_energies_of_the_blocks_are_part_of_the_loss(small: Checkpoint, context: Callable[..., Context]) -> None:
    without, little, much = (
        quantize(small, config({"feature_weight": weight}), context(small)).model.state_dict()["inner.weight"]
        for weight in (0.0, 1e-3, 10.0)
    )
    assert (little - without).abs().max() < (much - without).abs().max()


# --- the result is data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reduced", "factor"), [(True, 127 / 64), (False, 1.0)])
def test_weight_scales_follow_the_trained_weights_and_activation_scales_stay(
    reduced: bool, factor: float, small: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(small)
    settings: dict[str, Any] = {"reduce_range": reduced, "layers": ("conv",)}
    ptq, found = (quantize(small, c, ctx) for c in (QuantizeConfig(**PTQ, **settings), config(**settings)))
    before, after = scales_of(ptq).amax, scales_of(found).amax
    small_model: Any = small.model
    trained_model: Any = found.model
    assert before.keys() == after.keys()
    for name in ("inner.input", "inner.output"):
        assert torch.equal(before[name], after[name])
    assert not torch.allclose(small_model.inner.weight, trained_model.inner.weight)
    for name, expected in (("inner", factor), ("time", 1.0)):  # weight-only layers use the full range
        largest = getattr(trained_model, name).weight.detach().flatten(1).abs().amax(1)
        torch.testing.assert_close(after[f"{name}.weight"], largest * expected, rtol=1e-6, atol=0.0)
    integers = (trained_model.inner.weight / after["inner.weight"].view(-1, 1, 1, 1) * 127).round().abs()
    assert integers.max() == (64 if reduced else 127)


def test_the_input_is_unchanged_and_the_result_contains_no_quantizers(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    before = unet.hash
    found = quantize(unet, config({"steps": 1}), context(unet))
    assert unet.evolve().hash == before != found.hash and unet.quantization is None
    assert all(p.grad is None for p in unet.model.parameters())
    assert found.model.state_dict().keys() == unet.model.state_dict().keys() and not found.model.training
    assert not any("quantizer" in name for name, _ in found.model.named_modules())


def test_a_saved_and_reloaded_checkpoint_is_identical(
    unet: Checkpoint, context: Callable[..., Context], output: Callable[[Checkpoint], torch.Tensor], tmp_path: Path
) -> None:
    found = quantize(unet, config({"steps": 2}), context(unet))
    save_checkpoint(found, tmp_path / "saved")
    again = load_checkpoint(str(tmp_path / "saved"))
    assert again.hash == found.hash and torch.equal(output(again), output(found))


def test_a_half_precision_model_is_trained_in_float32_and_keeps_its_dtype(
    small: Checkpoint, context: Callable[..., Context]
) -> None:
    half_precision = small.evolve(model=small.clone_model().bfloat16())
    found = quantize(half_precision, config(), context(small))
    before: Any = half_precision.model
    trained_model: Any = found.model
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert not torch.equal(trained_model.inner.weight, before.inner.weight)
    largest = trained_model.inner.weight.detach().float().flatten(1).abs().amax(1)
    # calibration multiplied by 127/64 in bfloat16, which has 8 significant bits
    torch.testing.assert_close(scales_of(found).amax["inner.weight"], largest * 127 / 64, rtol=2**-8, atol=0.0)


def test_post_training_quantization_does_not_change_the_weights(
    small: Checkpoint, context: Callable[..., Context]
) -> None:
    found = quantize(small, QuantizeConfig(**PTQ), context(small))
    assert found.model is small.model and not context(small).work.exists()


@pytest.mark.parametrize(
    ("settings", "proportion"), [({}, 127 / 64), ({"smoothquant": {"alpha": 0.5}}, 127 / 64), ({"format": "int4"}, 1.0)]
)
def test_quantizers_follow_changed_weights(
    settings: dict[str, Any], proportion: float, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    found = quantize(unet, QuantizeConfig(**PTQ, **settings), context(unet))
    layer, model = "mid_block.attentions.0.to_q", fake_quantized(found.evolve(model=found.clone_model()))
    scales = scales_of(found)
    scaling = weight_scalings(model, scales)
    torch.manual_seed(0)
    weight = torch.randn(32, 32)
    follow_(model, {layer: scaling[layer]}, {layer: weight})
    smooth = scales.smooth.get(layer, torch.ones(32))
    blocks = (weight * smooth).abs().unflatten(1, (1, 32)).amax(2)  # one block of 32 is a full row
    quantized: Any = model.get_submodule(layer)
    torch.testing.assert_close(quantized.weight_quantizer.amax.flatten(), blocks[:, 0] * proportion)


@pytest.mark.parametrize("updates", ["full", "low_rank"])
def test_quantizers_follow_the_weights_at_every_step_of_training(
    updates: str, small: Checkpoint, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(model: Any, scaling: dict[str, Scaling], weights: dict[str, torch.Tensor]) -> None:
        follow_(model, scaling, weights)
        seen.append((weights["inner"].detach().clone(), model.inner.weight_quantizer.amax.flatten().clone()))

    monkeypatch.setattr("diffpress.compress.quantization.algorithms.qat_updates.follow_", spy)
    quantize(small, config({"updates": updates}), context(small))
    # five steps, and once for the averaged weights at the end
    assert len(seen) == 6 and not any(torch.equal(a[1], b[1]) for a, b in itertools.pairwise(seen))
    for weight, amax in seen:
        torch.testing.assert_close(amax, weight.flatten(1).abs().amax(1) * 127 / 64)


# --- low rank --------------------------------------------------------------------------------------------------


def test_low_rank_updates_have_that_rank_and_change_nothing_else(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    found = quantize(unet, config({"updates": "low_rank", "rank": 2, "steps": 3}, layers=("conv",)), context(unet))
    changed, layers = 0, scales_of(found).layers
    for name, old in unet.model.state_dict().items():
        if name.removesuffix(".weight") in layers:
            difference = (found.model.state_dict()[name] - old).flatten(1)
            sizes = torch.linalg.svdvals(difference.double())
            assert sizes[1] > 1e-7 and sizes[2:].max() < 1e-6  # limit of float32 in the sum
            changed += 1
        else:
            assert torch.equal(found.model.state_dict()[name], old)
    assert changed == len(layers) > 20


def test_only_the_factors_are_saved_for_resuming(
    small: Checkpoint, context: Callable[..., Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.compress.quantization.algorithms.qat._sqnr_db", lambda *_: 0.0)
    quantize(small, config({"updates": "low_rank", "rank": 2, "steps": 4}), context(small))
    with safe_open(context(small).work / "training.safetensors", framework="pt") as saved:
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}
    model = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
    # factors of inner [16, 16, 3, 3] and of time [16, 1], whose rank is at most 1
    assert sorted(model.values()) == [(1, 1), (2, 144), (16, 1), (16, 2)]
    assert all(sum(shape) <= 146 for shape in shapes.values())


@pytest.mark.parametrize("gptq", [False, True])
def test_training_starts_from_the_rounded_weights(
    gptq: bool, small: Checkpoint, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, torch.Tensor] = {}

    def spy(model: nn.Module, scales: Quantization) -> dict[str, Scaling]:
        scalings = weight_scalings(model, scales)
        started.update({name: weight.detach().clone() for name, weight in weights_of(model, scalings).items()})
        return scalings

    monkeypatch.setattr("diffpress.compress.quantization.algorithms.qat.weight_scalings", spy)
    found = quantize(small, config(gptq=gptq, format="w4a8", reduce_range=False), context(small))
    small_model: Any = small.model
    trained_model: Any = found.model
    assert torch.equal(started["inner"], small_model.inner.weight) != gptq
    largest = trained_model.inner.weight.detach().flatten(1).abs().amax(1)
    assert (scales_of(found).amax["inner.weight"] / largest).min() >= 1.0 - 1e-6  # nothing is clipped


def test_gradients_pass_through_quantizers_and_attention(unet: Checkpoint, context: Callable[..., Context]) -> None:
    found = quantize(unet, QuantizeConfig(**PTQ), context(unet))
    model: Any = fake_quantized(found.evolve(model=found.clone_model()))
    inputs = dummy_inputs(unet.spec, 3)
    model(inputs["sample"], inputs["timestep"], inputs["class_labels"]).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "to_q.w" in n)
    assert model.conv_in.weight.grad.abs().sum() > 0


# --- invalid settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"steps": 0}, {"learning_rate": 0.0}, {"lora_rank": 4}])
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        config(settings)
