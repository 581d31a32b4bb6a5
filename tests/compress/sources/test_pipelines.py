"""compress/sources/lora.py, single_file.py and hub.py, compared with diffusers on tiny pipelines."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffpress.compress.sources.hub import download_pipeline
from diffpress.compress.sources.lora import fuse_loras, parse_lora
from diffpress.compress.sources.single_file import from_single_file
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError
from tests.pipelines import KINDS, noise, sampled, tiny_pipeline

PROMPTS = ["a photo of a cat"]
LABELS = [3]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny pipeline, created once per kind and seed."""
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            made[kind, seed] = tiny_pipeline(kind, tmp_path_factory.mktemp(kind) / "pipeline", seed)
        return made[kind, seed]

    return folder


def opened(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)


def images(pipe: DiffusionPipeline, prompts: Sequence[str] = PROMPTS, labels: Sequence[int] = LABELS) -> torch.Tensor:
    # LCM draws noise between its steps
    draw: dict[str, Any] = (
        {} if "dit" in type(pipe).__name__.lower() else {"generator": torch.Generator().manual_seed(1)}
    )
    return sampled(pipe, noise(pipe, 1), prompts, labels, **draw)


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the tiny pipelines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_tiny_pipeline_depend_on_its_conditioning(kind: str, pipeline: Callable[..., Path]) -> None:
    pipe = opened(pipeline(kind))
    one = images(pipe)
    assert one.shape == (1, 3, 16, 16) and one.isfinite().all() and one.std() > 0.05
    other = images(pipe, ["red dog!"], [7])
    if not kind.startswith("ldm"):
        assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["sdxl", "pixart-alpha", "sd3"])
def test_a_tokenizer_in_the_older_format_gives_the_same_images(
    kind: str, pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    old = opened(tiny_pipeline(kind, tmp_path / "old", tokenizer_json=False))
    assert torch.equal(images(old), images(opened(pipeline(kind))))


# --- LoRA ------------------------------------------------------------------------------------------------------


def make_lora(folder: Path, into: Path, seed: int = 0) -> Path:
    """Save a LoRA as a training script does: rank 3, alpha 6, on every component that accepts LoRAs."""
    pipe = opened(folder)
    layers = {}
    torch.manual_seed(seed)
    for component in pipe._lora_loadable_modules:
        model = getattr(pipe, component)
        targets = ["to_q", "to_k", "to_v", "to_out.0"] if component in ("unet", "transformer") else ["q_proj", "v_proj"]
        model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False))
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        layers[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(into, **layers)
    return into


@pytest.fixture(scope="session")
def lora(pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a LoRA for a kind of pipeline, created once per kind and seed."""
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            made[kind, seed] = make_lora(pipeline(kind), tmp_path_factory.mktemp(kind) / "lora", seed)
        return made[kind, seed]

    return folder


@pytest.mark.parametrize("kind", ["sd", "sdxl", "lcm", "sd3", "flux"])
def test_a_fused_lora_gives_the_same_images_as_an_unfused_one_in_diffusers(
    kind: str, pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    pipe = opened(pipeline(kind))
    plain = images(pipe)
    pipe.load_lora_weights(lora(kind), adapter_name="mine")
    pipe.set_adapters("mine", 0.7)
    expected = images(pipe)
    assert (expected - plain).abs().max() > 0.005
    out = fuse_loras(pipeline(kind), [f"{lora(kind)}:0.7"], tmp_path / "fused")
    assert (images(opened(out)) - expected).abs().max() <= 1e-5  # W + BA is rounded to float32 once more


def test_two_loras_add_up(pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path) -> None:
    one, two = lora("sd", 1), lora("sd", 2)
    pipe = opened(pipeline("sd"))
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters(["one", "two"], [1.0, -0.5])
    out = fuse_loras(pipeline("sd"), [str(one), f"{two / 'pytorch_lora_weights.safetensors'}:-0.5"], tmp_path / "fused")
    assert (images(opened(out)) - images(pipe)).abs().max() <= 1e-5


def test_fusing_changes_neither_its_input_nor_the_other_components(
    pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    folder = pipeline("sd")
    before = contents(folder)
    out = fuse_loras(folder, [str(lora("sd"))], tmp_path / "fused")
    after = contents(out)
    assert contents(folder) == before and after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    weights = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert weights <= changed <= weights | {"unet/config.json", "text_encoder/config.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_hand_written_record_is_copied_along(
    pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_pipeline("sd", tmp_path / "own")
    (folder / "diffpress.json").write_text('{"plan": {"solver": "ddim", "steps": 5}}')
    (folder / "a-leftover.safetensors").write_bytes(b"x" * 10)
    out = fuse_loras(folder, [str(lora("sd"))], tmp_path / "fused")
    assert (out / "diffpress.json").read_bytes() == (folder / "diffpress.json").read_bytes()
    assert not (out / "a-leftover.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.7", "a.safetensors", 0.7),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
        ("C:a.safetensors:2", "C:a.safetensors", 2.0),
        ("odd:0.5", "odd:0.5", 1.0),
    ],
)
def test_a_lora_is_split_at_the_last_colon_only_before_a_number(
    text: str, path: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(path).write_bytes(b"")
    assert parse_lora(text) == (Path(path), scale)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere.safetensors", ("nowhere.safetensors", "no such file")),
        ("here.safetensors:strong", ("here.safetensors:strong", "SCALE a number")),
        ("here.safetensors:nan", ("here.safetensors:nan", "finite")),
        ("here.safetensors:inf", ("here.safetensors:inf", "finite")),
        ("empty", ("empty", "pytorch_lora_weights.safetensors")),
        ("here.bin", ("here.bin", "pickle")),
        ("here.pt:0.5", ("here.pt", "pickle")),
        ("here.safetensors", ("here.safetensors", "not readable as safetensors")),
    ],
)
def test_a_lora_that_cannot_be_read_is_refused(
    text: str, words: tuple[str, ...], pipeline: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("here.safetensors", "here.bin", "here.pt"):
        Path(name).write_bytes(b"nothing")
    refused(lambda: fuse_loras(pipeline("sd"), [text], tmp_path / "fused"), *words)
    assert not (tmp_path / "fused").exists()


def test_foreign_tensors_are_refused(pipeline: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "foreign.safetensors"
    save_file({"encoder.weight": torch.zeros(3)}, file)
    refused(lambda: fuse_loras(pipeline("sd"), [str(file)], tmp_path / "fused"), str(file), "no LoRA")


@pytest.mark.parametrize("other", ["sdxl", "sd3"])
def test_a_lora_of_another_model_is_refused(
    other: str, pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    refused(
        lambda: fuse_loras(pipeline("sd"), [str(lora(other))], tmp_path / "fused"), str(lora(other)), "another model"
    )


def test_a_lora_that_matches_only_some_layers_is_refused(
    pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    state = load_file(lora("sd") / "pytorch_lora_weights.safetensors")
    for half in ("lora_A", "lora_B"):
        known = next(name for name in state if name.startswith("unet.mid_block") and half in name)
        state[known.replace("mid_block", "far_block")] = state[known].clone()
    save_file(state, file)
    refused(lambda: fuse_loras(pipeline("sd"), [str(file)], tmp_path / "fused"), str(file), "'unet.far_block")


@pytest.mark.parametrize("kind", ["dit", "ldm", "pixart-alpha"])
def test_a_pipeline_without_lora_support_is_refused(
    kind: str, pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    refused(lambda: fuse_loras(pipeline(kind), [str(lora("sd"))], tmp_path / "fused"), str(pipeline(kind)), "no LoRA")


def test_a_lora_needs_a_complete_pipeline(
    pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    unet = pipeline("sd") / "unet"
    refused(lambda: fuse_loras(unet, [str(lora("sd"))], tmp_path / "fused"), str(unet), "model_index.json")


def test_a_pipeline_without_its_weights_is_refused(
    pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_pipeline("sd", tmp_path / "own")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(lambda: fuse_loras(folder, [str(lora("sd"))], tmp_path / "fused"), str(folder), "no weight files")


def test_without_peft_the_error_names_the_extra(
    pipeline: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lora("sd")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"--lora.*peft.*diffpress\[compress\]"):
        fuse_loras(pipeline("sd"), [str(file)], tmp_path / "fused")


# --- single files ----------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {  # the tiny U-Net has two down and two up blocks of one layer
    r"time_embedding\.linear_1": "time_embed.0",
    r"time_embedding\.linear_2": "time_embed.2",
    r"conv_in": "input_blocks.0.0",
    r"conv_norm_out": "out.0",
    r"conv_out": "out.2",
    r"down_blocks\.0\.resnets\.0": "input_blocks.1.0",
    r"down_blocks\.0\.attentions\.0": "input_blocks.1.1",
    r"down_blocks\.0\.downsamplers\.0\.conv": "input_blocks.2.0.op",
    r"down_blocks\.1\.resnets\.0": "input_blocks.3.0",
    r"mid_block\.resnets\.0": "middle_block.0",
    r"mid_block\.attentions\.0": "middle_block.1",
    r"mid_block\.resnets\.1": "middle_block.2",
    r"up_blocks\.0\.resnets\.0": "output_blocks.0.0",
    r"up_blocks\.0\.resnets\.1": "output_blocks.1.0",
    r"up_blocks\.0\.upsamplers\.0\.conv": "output_blocks.1.1.conv",
    r"up_blocks\.1\.resnets\.0": "output_blocks.2.0",
    r"up_blocks\.1\.attentions\.0": "output_blocks.2.1",
    r"up_blocks\.1\.resnets\.1": "output_blocks.3.0",
    r"up_blocks\.1\.attentions\.1": "output_blocks.3.1",
}
VAE = {
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.0\.resnets": "up.1.block",  # the original counts from the image's side
    r"up_blocks\.1\.resnets": "up.0.block",
    r"up_blocks\.0\.upsamplers\.0": "up.1.upsample",
    r"group_norm": "norm",
    r"to_([qkv])": r"\1",
    r"to_out\.0": "proj_out",
}


def renamed(name: str, table: dict[str, str]) -> str:
    for pattern, new in table.items():
        name = re.sub(rf"(?:^|(?<=\.)){pattern}(?=\.)", new, name)
    return name


def original_layout(pipe: Any) -> dict[str, torch.Tensor]:
    """Rename the tensors of a tiny Stable Diffusion to the CompVis layout, inverting diffusers' converter."""
    state = {}
    for name, tensor in pipe.unet.state_dict().items():
        table = {**UNET, **RESNET} if "resnets" in name else UNET
        state["model.diffusion_model." + renamed(name, table)] = tensor
    for name, tensor in pipe.vae.state_dict().items():
        square = "mid_block.attentions" in name and tensor.ndim == 2  # the original attention uses 1x1 convolutions
        state["first_stage_model." + renamed(name, VAE)] = tensor[:, :, None, None].clone() if square else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        state["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    return state


@pytest.fixture
def single_file(pipeline: Callable[..., Path], tmp_path: Path) -> Path:
    file = tmp_path / "finetune.safetensors"
    save_file(original_layout(opened(pipeline("sd"))), file)
    return file


def test_a_single_file_converts_back_to_its_pipeline(
    single_file: Path, pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    # take the configs from a pipeline with other weights, so that all compared weights come from the file
    out = from_single_file(single_file, tmp_path / "out", str(pipeline("sd", seed=1)))
    one, other = opened(out), opened(pipeline("sd"))
    for component in ("unet", "vae", "text_encoder"):
        state = getattr(one, component).state_dict()
        assert state.keys() == getattr(other, component).state_dict().keys()
        for name, tensor in getattr(other, component).state_dict().items():
            assert torch.equal(state[name], tensor), name
    assert one.scheduler.config == other.scheduler.config
    assert torch.equal(images(one), images(other))


def test_without_the_hub_the_error_names_the_detected_type_and_the_config_option(
    single_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> NoReturn:
        raise OSError("no network\nand a page of advice")

    monkeypatch.setattr(DiffusionPipeline, "load_config", offline)
    refused(lambda: from_single_file(single_file, tmp_path / "out"), str(single_file), "'v1'", "--config FOLDER")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.decoder.up.", "cond_stage_model."])
def test_a_single_file_that_lacks_a_component_is_refused(
    prefix: str, single_file: Path, pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    state = load_file(single_file)
    dropped = [name for name in state if name.startswith(prefix)][3:]
    save_file({name: tensor for name, tensor in state.items() if name not in dropped}, single_file)
    config = str(pipeline("sd"))
    refused(lambda: from_single_file(single_file, tmp_path / "out", config), str(single_file), config)
    assert not (tmp_path / "out").exists()


def test_a_single_file_that_does_not_match_its_config_is_refused(
    single_file: Path, pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    config = str(pipeline("sdxl"))
    refused(lambda: from_single_file(single_file, tmp_path / "out", config), str(single_file), config)


def test_a_file_in_an_unknown_layout_is_refused(pipeline: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    save_file({"encoder.weight": torch.zeros(3)}, file)
    refused(lambda: from_single_file(file, tmp_path / "out", str(pipeline("sd"))), str(file), "layout")


def test_a_config_of_a_pipeline_without_single_file_support_is_refused(
    single_file: Path, pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    config = str(pipeline("dit"))
    refused(lambda: from_single_file(single_file, tmp_path / "out", config), config, "DiTPipeline")


@pytest.mark.parametrize(
    ("name", "word"),
    [("m.ckpt", "pickle"), ("m.gguf", "safetensors"), ("gone.safetensors", "no such"), ("m.safetensors", "readable")],
)
def test_a_single_file_that_cannot_be_read_is_refused(name: str, word: str, tmp_path: Path) -> None:
    for made in ("m.ckpt", "m.gguf", "m.safetensors"):
        (tmp_path / made).write_bytes(b"nothing")
    refused(lambda: from_single_file(tmp_path / name, tmp_path / "out"), name, word)


# --- the hub ---------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded_by_diffusers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def download(*ids: str, **how: Any) -> str:
        calls.append((ids, how))
        return str(tmp_path)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert download_pipeline("someone/model-8.1") == tmp_path
    assert calls == [(("someone/model-8.1",), {"use_safetensors": True})]


def test_a_hub_error_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("401 Client Error\nand a page of HTML")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    refused(lambda: download_pipeline("someone/model"), "someone/model", "401 Client Error")
