"""LoRAs that are set in a bundle, end to end: against diffusers with the same LoRAs, from the same noise.

The engines compute in fp32, so that only the order of additions differs: 90 dB PSNR is far above what a wrong scale or
a layer that was left out reaches (20 dB), and far below the measured 125 dB and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import diffpress as dp  # noqa: E402
from diffpress.cli.main import main  # noqa: E402
from diffpress.compress.checkpoint import Checkpoint  # noqa: E402
from diffpress.compress.sources.load import load_checkpoint  # noqa: E402
from diffpress.export.verify import parity  # noqa: E402
from diffpress.runtime.engines import available  # noqa: E402
from diffpress.runtime.errors import InvalidInputError  # noqa: E402
from diffpress.runtime.lora.names import stability_names  # noqa: E402
from tests.against_diffusers import PROMPTS, SEEDS, psnr_db, sampled_by_diffusers, with_short_plan  # noqa: E402

ENGINES = [name for name in ("onnxruntime", "openvino") if name in available()]
RANK = 6
Tensors = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def export(folder: Path | Checkpoint, out: Path, **settings: Any) -> Path:
    """Export with slots; parity is checked in ONNX Runtime alone, which takes half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "runs", lambda precision: ["onnxruntime"])
        return dp.export(folder, out, lora_slots=2, lora_rank=RANK, threads=1, **settings).path


@pytest.fixture(scope="module")
def slotted(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundle of a tiny pipeline with slots beside all layers, made once per kind; do not modify."""
    made: dict[str, Path] = {}

    def bundle(kind: str) -> Path:
        if kind not in made:
            made[kind] = export(tiny_folder(kind), tmp_path_factory.mktemp(kind) / "bundle", lora_layers="all")
        return made[kind]

    return bundle


def drawn(pipe: Any, components: Mapping[str, tuple[str, ...]], rank: int, seed: int) -> dict[str, Tensors]:
    """Draw down and up for the layers whose names end so -> 'component layer' -> {"down", "up"}."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for component, ends in components.items():
        for name, module in getattr(pipe, component).named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(ends):
                out, width, *kernel = module.weight.shape
                down = torch.randn(rank, width, *kernel, generator=generator) / (width * np.prod(kernel)) ** 0.5
                up = 0.3 * torch.randn(out, rank, *[1] * len(kernel), generator=generator)
                found[f"{component} {name}"] = {"down": down, "up": up}
    return found


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
COMPONENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sd": {
        "unet": (*ATTENTION, "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    },
    "sdxl": {
        "unet": (*ATTENTION, "proj_in", "proj_out", "conv1"),
        "text_encoder": ("q_proj", "out_proj"),
        "text_encoder_2": ("v_proj", "fc1", "out_proj"),
    },
    "sd3": {"transformer": (*ATTENTION, "add_q_proj", "to_add_out"), "text_encoder_2": ("q_proj", "out_proj")},
    "flux": {"transformer": (*ATTENTION, "add_k_proj", "proj_mlp", "proj_out"), "text_encoder": ("q_proj", "out_proj")},
    "pixart-alpha": {"transformer": ATTENTION},
}


def peft_layout(factors: Mapping[str, Tensors]) -> Tensors:
    state: Tensors = {}
    for key, own in factors.items():
        component, layer = key.split(" ")
        prefix = f"{component}.text_model." if component.startswith("text") else f"{component}."
        state |= {f"{prefix}{layer}.lora_A.weight": own["down"], f"{prefix}{layer}.lora_B.weight": own["up"]}
    return state


def kohya_layout(factors: Mapping[str, Tensors], original: bool = False) -> Tensors:
    """Name the tensors as kohya's scripts do, those of SDXL (`original`) after the published network."""
    state: Tensors = {}
    names = {key: key.split(" ")[1] for key in factors}
    of_unet = [layer for key, layer in names.items() if key.startswith("unet ")]
    published = stability_names(of_unet) if original else {}
    for key, own in factors.items():
        component, layer = key.split(" ")
        number = component.removeprefix("text_encoder").removeprefix("_") or "1"
        text = f"lora_te{number if original else ''}_text_model_"
        stem = (text if component.startswith("text") else "lora_unet_") + published.get(layer, layer).replace(".", "_")
        state |= {f"{stem}.lora_down.weight": own["down"], f"{stem}.lora_up.weight": own["up"]}
        state[f"{stem}.alpha"] = torch.tensor(float(len(own["down"])) / 2)
    return state


def images_of(pipe: dp.Pipeline, checkpoint: Checkpoint) -> np.ndarray:
    """Sample images [N, 3, H, W] in [0, 1]."""
    spec = checkpoint.spec
    conditions = pipe.conditions(len(SEEDS), spec, prompts=PROMPTS)
    return np.concatenate(list(pipe.images(SEEDS, conditions, spec))) / 2 + 0.5


def fused(folder: Path, loras: list[tuple[Mapping[str, Tensors], float]]) -> Any:
    """Return the pipeline with the factors, times their scales, added to its weights."""
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for factors, scale in loras:
        for key, own in factors.items():
            component, layer = key.split(" ")
            weight = getattr(pipe, component).get_submodule(layer).weight
            weight.data += scale * torch.tensordot(own["up"].flatten(1), own["down"], 1)
    return pipe


# --- the images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_loras_change_images_as_in_diffusers_and_leave_no_trace(
    engine: str, slotted: Callable[[str], Path], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder("sd")
    checkpoint = with_short_plan(load_checkpoint(folder), 3)
    plain = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    first, second = (drawn(plain, COMPONENTS["sd"], rank, rank) for rank in (4, RANK))
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(peft_layout(first), a)
    save_file(kohya_layout(second), b)

    def theirs(**scales: float) -> np.ndarray:
        pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        for name in scales:
            pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
        pipe.set_adapters(list(scales), list(scales.values()))
        return sampled_by_diffusers(folder, checkpoint, pipe=pipe)

    with dp.Pipeline(slotted("sd"), engine, threads=1) as pipe:
        without = images_of(pipe, checkpoint)
        pipe.set_loras({a: 0.8})
        alone = images_of(pipe, checkpoint)
        assert psnr_db(alone, theirs(a=0.8)) >= 90 and psnr_db(alone, without) < 30
        pipe.set_loras({a: 0.5, b: -1})
        both = images_of(pipe, checkpoint)
        assert psnr_db(both, theirs(a=0.5, b=-1)) >= 90 and psnr_db(both, alone) < 30
        pipe.set_loras({a: 0.8})
        np.testing.assert_array_equal(images_of(pipe, checkpoint), alone)
        pipe.set_loras({})
        np.testing.assert_array_equal(images_of(pipe, checkpoint), without)
    with dp.Pipeline(slotted("sd"), engine, threads=1, loras={a: 0.8}, keep_open=True) as pipe:
        np.testing.assert_array_equal(images_of(pipe, checkpoint), alone)
        assert pipe.loras == {a: 0.8}


FAMILIES = [("sdxl", True), ("sdxl", False), ("sd3", False), ("flux", False), ("pixart-alpha", False)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kohya"), FAMILIES)
def test_every_family_computes_with_a_lora_what_fused_weights_compute(
    kind: str, kohya: bool, slotted: Callable[[str], Path], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder(kind)
    checkpoint = with_short_plan(load_checkpoint(folder), 3)
    factors = drawn(DiffusionPipeline.from_pretrained(folder, local_files_only=True), COMPONENTS[kind], 4, 0)
    save_file(kohya_layout(factors, original=True) if kohya else peft_layout(factors), tmp_path / "a.safetensors")
    theirs = sampled_by_diffusers(folder, checkpoint, pipe=fused(folder, [(factors, 0.35 if kohya else 0.7)]))
    with dp.Pipeline(slotted(kind), "onnxruntime", threads=1, loras={tmp_path / "a.safetensors": 0.7}) as pipe:
        with_lora = images_of(pipe, checkpoint)
        pipe.set_loras(None)
        assert psnr_db(with_lora, theirs) >= 90 and psnr_db(with_lora, images_of(pipe, checkpoint)) < 40


# --- compressed networks ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_lora_of_the_unpruned_network_is_cut_to_a_pruned_and_quantized_one(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder("sd")
    teacher = with_short_plan(load_checkpoint(folder), 3)
    stages = [dp.Prune(method="magnitude", ratio=0.3, round_to=4), dp.Quantize("int8", samples=2, batch=2)]
    pruned = dp.compress(teacher, stages[:1], out=tmp_path / "pruned")
    factors = drawn(DiffusionPipeline.from_pretrained(folder, local_files_only=True), {"unet": ATTENTION}, 4, 0)
    file = tmp_path / "a.safetensors"
    save_file(peft_layout(factors), file)
    model = pruned.clone_model()
    cut = 0
    for key, own in factors.items():
        name = f"{key.split(' ')[1]}.weight"
        added = own["up"] @ own["down"]
        for dim, indices in pruned.kept_indices.get(name, {}).items():
            added, cut = added.index_select(dim, torch.from_numpy(indices)), cut + 1
        model.get_parameter(name).data += 0.7 * added
    assert cut > 0
    bundle = export(pruned, tmp_path / "bundle")
    expected = export(pruned.evolve(model=model), tmp_path / "expected")
    with dp.Pipeline(expected, "onnxruntime", threads=1) as pipe:
        theirs = images_of(pipe, pruned)
    with dp.Pipeline(bundle, "onnxruntime", threads=1, loras={file: 0.7}) as pipe:
        assert psnr_db(images_of(pipe, pruned), theirs) >= 90
    small = dp.compress(teacher, stages, out=tmp_path / "int8")
    quantized = export(small, tmp_path / "quantized")
    with dp.Pipeline(quantized, "onnxruntime", threads=1) as pipe:
        without = images_of(pipe, small)
        pipe.set_loras({file: 0.7})
        found = images_of(pipe, small)
        # the images of the float network with this LoRA, and not those without it
        assert psnr_db(found, theirs) > psnr_db(without, theirs) + 3
        pipe.set_loras({})
        np.testing.assert_array_equal(images_of(pipe, small), without)


# --- bundles and commands --------------------------------------------------------------------------------------


def test_graphs_with_slots_store_no_weight_twice(slotted: Callable[[str], Path]) -> None:
    bundle = dp.load_bundle(slotted("sd"))
    files, entry = bundle.manifest["files"], bundle.manifest["graphs"]["denoiser"]
    assert "denoiser.lora.onnx.data" not in files and "text_encoder.lora.onnx.data" not in files
    assert entry["lora"]["bytes"] == files["denoiser.lora.onnx"]["bytes"] < files["unet/model.onnx_data"]["bytes"] / 4
    assert not any(name.startswith("lora.") for name in entry["inputs"])
    assert entry["lora"]["parity"]["onnxruntime"]["sqnr_db"] > 60 and entry["lora"]["without"] == []


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_sample_sets_loras_and_records_them(
    slotted: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_folder: Callable[..., Path]
) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_folder("sd"), local_files_only=True)
    file = tmp_path / "a.safetensors"
    save_file(peft_layout(drawn(pipe, {"unet": ATTENTION}, 2, 0)), file)
    words = ["sample", slotted("sd"), "--prompt", "cat", "--steps", 2, "--engine", "onnxruntime"]
    words += ["--threads", 1, "--out", f"{tmp_path}/out/", "--no-cache"]
    assert run(*words, "--lora", f"{file}:0.5") == 0
    assert run(*words, "--lora", f"{file}:0.5") == 0 and "nothing to do" in capsys.readouterr().out
    assert run(*words, "--lora", f"{file}:0.6") == 2 and "other settings (loras: " in capsys.readouterr().err
    refusals = {
        (f"{file}:nan",): "scale nan is not a finite number",
        (f"{tmp_path}/none.safetensors",): "no such file",
        (str(file), f"{file}:1", f"{file}:0.2"): "named twice",
    }
    for loras, reason in refusals.items():
        flags = [word for lora in loras for word in ("--lora", lora)]
        assert run(*words, *flags) == 2
        message = capsys.readouterr().err.strip()
        assert reason in message and "\n" not in message


def test_a_refused_lora_changes_nothing(slotted: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with dp.Pipeline(slotted("sd"), "onnxruntime", threads=1) as pipe:
        engine = pipe.denoiser
        with pytest.raises(InvalidInputError, match="cut off"):
            pipe.set_loras({tmp_path / "a.safetensors": 1.0})
        assert pipe.denoiser is engine and pipe.loras == {}
    with pytest.raises(InvalidInputError, match="closed"):
        pipe.set_loras({})


def test_slots_with_tensorrt_are_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    from diffpress.compress.config import ExportConfig
    from diffpress.export.lora_graphs import check_lora_slots

    with pytest.raises(InvalidInputError, match="lora_slots: TensorRT engines have no slots"):
        check_lora_slots(ExportConfig(targets=("tensorrt",), lora_slots=1))
    check_lora_slots(ExportConfig(targets=("tensorrt",)))
    with pytest.raises(InvalidInputError, match="lora_rank"):
        dp.export(tiny_folder("sd"), tmp_path / "bundle", lora_slots=1, lora_rank=0)
