"""compress/sources/load.py: every kind of checkpoint is loaded, and invalid ones are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.models.adapter import dummy_inputs
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.losses import forward
from diffpress.runtime.errors import InvalidInputError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(reference: str | Path, *words: str) -> None:
    """Assert that loading raises InvalidInputError with one line that contains all `words`."""
    with pytest.raises(InvalidInputError) as caught:
        load_checkpoint(reference)
    message = str(caught.value)
    assert "\n" not in message.strip() and all(word in message for word in words), message


# --- accepted --------------------------------------------------------------------------------------------------


def test_a_pipeline_folder_loads_the_model_that_diffusers_saved(pipeline_folder: Path, plain: Checkpoint) -> None:
    loaded = load_checkpoint(pipeline_folder)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 90])
    with torch.no_grad():
        assert torch.equal(loaded.model(x, t).sample, plain.model(x, t).sample)
    assert loaded.spec.sample_shape == (1, 8, 8) and loaded.spec.conditioning.kind == "none"
    assert len(loaded.spec.schedule) == 100 and not loaded.model.training


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_a_bare_denoiser_folder_uses_the_scheduler_beside_it(
    name: str, pipeline_folder: Path, scheduler: Callable[..., None], tmp_path: Path
) -> None:
    scheduler(pipeline_folder, prediction_type="v_prediction")
    (pipeline_folder / "unet").rename(pipeline_folder / name)
    pipeline, bare = load_checkpoint(pipeline_folder), load_checkpoint(str(pipeline_folder / name))
    assert bare.hash == pipeline.hash and bare.spec.prediction == "v"
    save_checkpoint(bare, tmp_path / "saved")
    assert (tmp_path / "saved" / name / WEIGHTS).is_file()


def test_a_denoiser_folder_of_any_name_is_loaded(plain: Checkpoint, tmp_path: Path) -> None:
    model: Any = plain.model
    model.save_pretrained(tmp_path / "network")
    loaded = load_checkpoint(tmp_path / "network")
    assert loaded.spec.prediction == "epsilon" and len(loaded.spec.schedule) == 1000
    save_checkpoint(loaded, tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved").hash == loaded.hash


def test_the_number_of_classes_is_read_from_the_config(unet: Checkpoint, tmp_path: Path) -> None:
    model: Any = unet.model
    model.save_pretrained(tmp_path / "unet")
    conditioning = load_checkpoint(tmp_path).spec.conditioning
    assert (conditioning.kind, conditioning.classes, conditioning.null_label) == ("class", 4, None)


def test_a_hand_written_record_adds_null_label_and_plan(unet: Checkpoint, tmp_path: Path) -> None:
    model: Any = unet.model
    model.save_pretrained(tmp_path / "unet")
    conditioning, plan = {"kind": "class", "classes": 3, "null_label": 3}, {"solver": "dpmpp_2m", "steps": 5}
    (tmp_path / "diffpress.json").write_text(json.dumps({"conditioning": conditioning, "plan": plan}))
    spec = load_checkpoint(tmp_path).spec
    assert spec.conditioning.null_label == 3 and (spec.plan.solver, spec.plan.steps) == ("dpmpp_2m", 5)


def test_a_sharded_half_precision_checkpoint_is_loaded_as_float32(pipeline_folder: Path) -> None:
    component = pipeline_folder / "unet"
    state = {name: tensor.half() for name, tensor in load_file(component / WEIGHTS).items()}
    names = sorted(state)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, names_in_file in shards.items():
        save_file({name: state[name] for name in names_in_file}, component / file)
    (component / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, names_in_file in shards.items() for name in names_in_file}}
    (component / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    model = load_checkpoint(pipeline_folder).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(model.state_dict()[name], state[name].float()) for name in names)


@pytest.mark.parametrize(
    ("setting", "prediction"), [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "sample")]
)
def test_every_prediction_type_is_read(
    setting: str, prediction: str, pipeline_folder: Path, scheduler: Callable[..., None]
) -> None:
    scheduler(pipeline_folder, prediction_type=setting)
    assert load_checkpoint(pipeline_folder).spec.prediction == prediction


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_schedule_is_the_one_diffusers_samples_with(
    kind: str, pipeline_folder: Path, scheduler: Callable[..., None]
) -> None:
    settings = {"beta_schedule": kind, "beta_start": 0.001, "beta_end": 0.03, "num_train_timesteps": 200}
    scheduler(pipeline_folder, **settings)
    schedule = load_checkpoint(pipeline_folder).spec.schedule
    theirs: Any = DDPMScheduler(**settings)
    expected = theirs.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(np.square(schedule.alphas), expected, rtol=1e-12, atol=0)
    np.testing.assert_allclose(np.square(schedule.sigmas), 1.0 - expected, rtol=1e-9, atol=1e-12)


def test_a_flow_matching_scheduler_is_read_as_a_flow_model(
    pipeline_folder: Path, scheduler: Callable[..., None]
) -> None:
    scheduler(pipeline_folder, _class_name="FlowMatchEulerDiscreteScheduler")
    spec = load_checkpoint(pipeline_folder).spec
    theirs: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100)
    assert spec.prediction == "flow"
    for t, sigma in zip(theirs.timesteps.tolist(), theirs.sigmas.tolist(), strict=False):
        assert spec.schedule.sigmas[round(t)] == pytest.approx(sigma, abs=1e-6)
        assert spec.schedule.alphas[round(t)] == pytest.approx(1.0 - sigma, abs=1e-6)


def test_clip_sample_is_read_from_the_scheduler(pipeline_folder: Path, scheduler: Callable[..., None]) -> None:
    found = []
    for clip in (True, False):
        scheduler(pipeline_folder, clip_sample=clip)
        found.append(load_checkpoint(pipeline_folder).spec.plan.clip)
    assert found == [True, False]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_a_custom_module_of_every_prediction_is_loaded(
    prediction: str, custom_files: Callable[..., tuple[Path, Path]]
) -> None:
    file, weights = custom_files(prediction)
    loaded = load_checkpoint(f"{file}:{weights}")
    assert loaded.spec.prediction == prediction and not loaded.model.training
    model: Any = loaded.model
    assert torch.equal(model.first.weight, load_file(weights)["first.weight"])
    inputs = dummy_inputs(loaded.spec, 2)
    assert forward(loaded.model, loaded.spec, inputs["sample"], inputs["timestep"], {}).shape == (2, 1, 8, 8)


def test_a_checkpoint_may_use_the_components_of_another_folder(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_folder("sd"), tmp_path / "teacher")
    save_checkpoint(load_checkpoint(teacher), tmp_path / "student")
    for name in ("vae", "text_encoder", "tokenizer", "model_index.json"):
        part = tmp_path / "student" / name
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    edit(tmp_path / "student" / "diffpress.json", pipeline="../teacher")
    loaded = load_checkpoint(tmp_path / "student")
    assert loaded.hash == load_checkpoint(teacher).hash and loaded.source.pipeline_folder == teacher.resolve()
    save_checkpoint(loaded, tmp_path / "stage")
    assert (tmp_path / "stage" / "vae" / "config.json").is_file(), "a later checkpoint is complete again"
    edit(tmp_path / "student" / "diffpress.json", pipeline="../nowhere")
    refused(tmp_path / "student", "diffpress.json: pipeline", "nowhere has no model_index.json")


def test_a_hub_id_is_downloaded_by_diffusers(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(pipeline_folder)

    def snapshot(name: str, *, revision: str, allow_patterns: list[str]) -> None:
        assert (name, revision) == ("someone/model-8.1", pipeline_folder.name)
        assert all(any(fnmatch(file, pattern) for pattern in allow_patterns) for file in ("LICENSE.md", "README.md"))
        assert not any(fnmatch("unet/model.bin", pattern) for pattern in allow_patterns)
        raise OSError("offline")  # the licence is missing then, and the checkpoint is loaded

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_checkpoint("someone/model-8.1").hash == load_checkpoint(pipeline_folder).hash
    assert calls == [("someone/model-8.1", {"use_safetensors": True})]
    assert "its licence could not be downloaded, bundles will lack it (offline)" in caplog.text


def test_a_hub_error_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> NoReturn:
        raise RuntimeError("401 Client Error\nand a page of HTML")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    refused("someone/model", "someone/model", "401 Client Error")


# --- refused weights -------------------------------------------------------------------------------------------


def test_a_folder_without_weights_is_refused(pipeline_folder: Path) -> None:
    (pipeline_folder / "unet" / WEIGHTS).unlink()
    refused(pipeline_folder, str(pipeline_folder / "unet"), "no weight files")


def test_a_truncated_file_is_refused(pipeline_folder: Path) -> None:
    file = pipeline_folder / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    refused(pipeline_folder, str(file), "truncated")


def test_an_empty_file_is_refused(pipeline_folder: Path) -> None:
    (pipeline_folder / "unet" / WEIGHTS).write_bytes(b"")
    refused(pipeline_folder, WEIGHTS, "not readable as safetensors")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = folder / "unet" / WEIGHTS
    state = load_file(file)
    change(state)
    save_file(state, file)
    return file


def test_foreign_tensor_names_are_refused(pipeline_folder: Path) -> None:
    file = change_weights(pipeline_folder, lambda state: state.update({"encoder.weight": torch.zeros(3)}))
    refused(pipeline_folder, str(file), "'encoder.weight'", "foreign")


def test_a_missing_tensor_is_refused(pipeline_folder: Path) -> None:
    file = change_weights(pipeline_folder, lambda state: state.pop("conv_in.weight"))
    refused(pipeline_folder, str(file), "'conv_in.weight' is missing")


def test_a_wrong_shape_is_refused(pipeline_folder: Path) -> None:
    file = change_weights(pipeline_folder, lambda state: state.update({"conv_in.bias": torch.zeros(5)}))
    refused(pipeline_folder, str(file), "'conv_in.bias'", "[5]", "[16]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(value: float, pipeline_folder: Path) -> None:
    file = change_weights(pipeline_folder, lambda state: state["conv_in.bias"].fill_(value))
    refused(pipeline_folder, str(file), "'conv_in.bias'", "NaN")


def test_a_folder_with_only_a_pickle_is_refused(pipeline_folder: Path) -> None:
    (pipeline_folder / "unet" / WEIGHTS).rename(pipeline_folder / "unet" / "diffusion_pytorch_model.bin")
    refused(pipeline_folder, "diffusion_pytorch_model.bin", "pickle", "safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pth", ".bin"])
def test_a_pickle_named_as_the_checkpoint_is_refused_unread(suffix: str, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    file = tmp_path / f"model{suffix}"
    torch.save(Trap(), file)
    refused(file, str(file), "pickle", "safetensors")
    assert not (tmp_path / "sprung").exists()


def test_several_weight_files_without_an_index_are_refused(pipeline_folder: Path) -> None:
    component = pipeline_folder / "unet"
    (component / WEIGHTS).rename(component / "a.safetensors")
    (component / "b.safetensors").write_bytes((component / "a.safetensors").read_bytes())
    refused(pipeline_folder, str(component), "several", "a.safetensors, b.safetensors")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"conv_in.bias": 5}}])
def test_an_index_that_names_no_files_is_refused(index: dict[str, Any], pipeline_folder: Path) -> None:
    (pipeline_folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(pipeline_folder, f"{WEIGHTS}.index.json")


# --- refused configs -------------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such checkpoint folder")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(tmp_path, str(tmp_path), "config.json")


def test_an_invalid_single_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "model.safetensors", "model.safetensors", "not readable as safetensors")


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "diffpress.json"])
@pytest.mark.parametrize("text", ["{not json", "[1, 2]", "\ufffd"])
def test_broken_json_is_refused(file: str, text: str, pipeline_folder: Path) -> None:
    (pipeline_folder / file).write_text(text)
    refused(pipeline_folder, str(pipeline_folder / file))


def test_an_unknown_class_is_refused(pipeline_folder: Path) -> None:
    edit(pipeline_folder / "unet" / "config.json", _class_name="Kandinsky9")
    refused(pipeline_folder, "config.json", "'Kandinsky9'", "UNet2DModel", "file.py:weights")


@pytest.mark.parametrize(
    "change",
    [
        {"down_block_types": ["NoSuchBlock", "DownBlock2D"]},
        {"block_out_channels": [16]},
        {"block_out_channels": [-16, 32]},
        {"block_out_channels": [17, 32]},
        {"norm_num_groups": 0},
        {"layers_per_block": "two"},
        {"sample_size": "large"},
        {"in_channels": None},
    ],
)
def test_an_invalid_config_is_refused(change: dict[str, Any], pipeline_folder: Path) -> None:
    edit(pipeline_folder / "unet" / "config.json", **change)
    refused(pipeline_folder, "config.json")


def test_a_config_with_default_channels_is_read(tmp_path: Path) -> None:
    model: Any = UNet2DModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
    )
    model.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "config.json"
    config = json.loads(file.read_text())
    for key in ("in_channels", "out_channels"):
        del config[key]
    file.write_text(json.dumps(config))
    assert load_checkpoint(tmp_path).spec.sample_shape == (3, 8, 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "score"},
        {"beta_schedule": "sideways"},
        {"num_train_timesteps": "many"},
        {"num_train_timesteps": 1},
        {"num_train_timesteps": "many", "_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"beta_start": "small"},
    ],
)
def test_an_invalid_scheduler_config_is_refused(
    settings: dict[str, Any], pipeline_folder: Path, scheduler: Callable[..., None]
) -> None:
    scheduler(pipeline_folder, **settings)
    refused(pipeline_folder)


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"plan": {"steps": 5}}, "plan"),
        ({"plan": {"solver": "ddim", "steps": "five"}}, "plan"),
        ({"plan": {"solver": "ddim", "steps": 5, "grid": "sideways"}}, "sideways"),
        ({"conditioning": {"kind": "smell"}}, "smell"),
        ({"conditioning": []}, "diffpress.json"),
    ],
)
def test_an_invalid_hand_written_record_is_refused(record: dict[str, Any], word: str, pipeline_folder: Path) -> None:
    (pipeline_folder / "diffpress.json").write_text(json.dumps(record))
    refused(pipeline_folder, word)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": {"conv_in": "wide"}},
        {"widths": ["conv_in"]},
        {"history": [{"stage": "prune"}]},
        {"history": 3},
        {"spec": {"prediction": "v"}},
        {"quantization": {"format": "int8"}},  # without a scales file
        {"format": 99},  # of a newer diffpress
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any], pruned: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(pruned, tmp_path / "saved")
    edit(tmp_path / "saved" / "diffpress.json", **change)
    refused(tmp_path / "saved", str(tmp_path / "saved"))


@pytest.mark.parametrize(
    "scales",
    [
        {"amax.no_such_layer.weight": torch.ones(3)},
        {"amax.conv_out.weight": torch.ones(3)},
        {"amax.mid_block.resnets.0.conv1.input": torch.tensor(float("nan"))},
        {"mid_block.resnets.0.conv1.input": torch.tensor(1.0)},
    ],
)
def test_scales_of_another_model_are_refused(
    scales: dict[str, torch.Tensor], quantized: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(quantized, tmp_path / "saved")
    save_file(scales, tmp_path / "saved" / "quantization.safetensors")
    with pytest.raises(InvalidInputError):
        fake_quantized(load_checkpoint(tmp_path / "saved"))


# --- refused custom modules ------------------------------------------------------------------------------------


def test_a_missing_custom_file_is_refused(tmp_path: Path) -> None:
    refused(f"{tmp_path / 'mine.py'}:{tmp_path}", "mine.py", "no such file")


def test_missing_custom_weights_are_refused(custom_files: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    file, _ = custom_files()
    refused(f"{file}:{tmp_path / 'nowhere'}", "nowhere", "mine.py")


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("x = 1", "load"),
        ("def load(path): raise ValueError('no luck')", "no luck"),
        ("def load(path", "SyntaxError"),
        ("import no_such_package", "no_such_package"),
        ("def load(path): return 5", "must return"),
        ("def load(path): return None, None", "must return"),
        ("def load(path): raise SystemExit(0)", "SystemExit"),
    ],
)
def test_an_invalid_custom_file_is_refused(
    code: str, word: str, custom_files: Callable[..., tuple[Path, Path]]
) -> None:
    file, weights = custom_files()
    file.write_text(code)
    refused(f"{file}:{weights}", "mine.py", word)


def test_custom_weights_with_nan_are_refused(custom_files: Callable[..., tuple[Path, Path]]) -> None:
    file, weights = custom_files()
    state = load_file(weights)
    state["inner.bias"][3] = float("nan")
    save_file(state, weights)
    refused(f"{file}:{weights}", "mine.safetensors", "'inner.bias'", "NaN")


def test_a_saved_custom_checkpoint_with_a_damaged_record_is_refused(
    custom_files: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    file, weights = custom_files()
    save_checkpoint(load_checkpoint(f"{file}:{weights}"), tmp_path / "saved")
    record = json.loads((tmp_path / "saved" / "diffpress.json").read_text())
    del record["spec"]
    (tmp_path / "saved" / "diffpress.json").write_text(json.dumps(record))
    refused(f"{file}:{tmp_path / 'saved'}", "diffpress.json", "spec")


def test_built_in_checkpoints_are_found_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("calib_data/teacher").source.kind == "UNet2DModel"
    refused("calib_data/no-such-teacher", "calib_data/no-such-teacher", "calib_data/icons/teacher")
