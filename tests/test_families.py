"""Every pipeline family end to end: diffpress' images against those of diffusers for the same folder.

Both sides use the same weights, noise, prompts and scheduler. If torch runs the networks, only the order of float32
additions differs: 60 dB PSNR is far above what a wrong formula reaches, and far below the measured 126 dB and more. If
an ONNX engine runs them, its kernels differ as well, and the bound is 40 dB.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import (  # noqa: E402
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image  # noqa: E402

from diffpress.cli.main import main  # noqa: E402
from diffpress.compress.checkpoint import save_checkpoint  # noqa: E402
from diffpress.compress.config import ExportConfig  # noqa: E402
from diffpress.compress.context import Context  # noqa: E402
from diffpress.compress.models.adapter import adapter_for, dummy_inputs  # noqa: E402
from diffpress.compress.models.components import component_names, load_component  # noqa: E402
from diffpress.compress.models.counts import count  # noqa: E402
from diffpress.compress.models.low_rank_layers import low_rank_layers  # noqa: E402
from diffpress.compress.models.removed_blocks import removed_blocks  # noqa: E402
from diffpress.compress.models.torch_network import TorchNetwork  # noqa: E402
from diffpress.compress.pipeline import run_stages  # noqa: E402
from diffpress.compress.pruning.config import PruneLowRankConfig  # noqa: E402
from diffpress.compress.pruning.prune import prune  # noqa: E402
from diffpress.compress.quantization.quantizers import fake_quantized  # noqa: E402
from diffpress.compress.recipe import Recipe  # noqa: E402
from diffpress.compress.sources.load import load_checkpoint  # noqa: E402
from diffpress.export.bundle import export_bundle  # noqa: E402
from diffpress.runtime.image_size import resized  # noqa: E402
from diffpress.runtime.sampler import generate, noise_for  # noqa: E402
from tests.against_diffusers import (  # noqa: E402
    LABELS,
    PROMPTS,
    SEEDS,
    psnr_db,
    sampled_by_diffusers,
    sampled_in_torch,
    with_short_plan,
)
from tests.pipelines import CLIP_TOKENS, KINDS, unet  # noqa: E402

ROOT = Path(__file__).parents[1]
LARGE = ("pixart-alpha-1024", "pixart-sigma")  # their position embedding fixes latents of 128 x 128
EVERY_KIND = [pytest.param(kind, marks=pytest.mark.slow if kind in LARGE else ()) for kind in KINDS]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- sampler and components, in torch --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_sampler_reproduces_the_images_of_diffusers(kind: str, tiny_folder: Callable[..., Path]) -> None:
    checkpoint = with_short_plan(load_checkpoint(tiny_folder(kind)), steps=3)
    assert psnr_db(sampled_in_torch(checkpoint), sampled_by_diffusers(tiny_folder(kind), checkpoint)) >= 60


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_negative_prompts_and_guidance_match_diffusers(kind: str, tiny_folder: Callable[..., Path]) -> None:
    checkpoint = with_short_plan(load_checkpoint(tiny_folder(kind)), steps=3, guidance=3.0)
    negatives = ["dog", "a red photo"]
    ours = sampled_in_torch(checkpoint, negatives)
    theirs = sampled_by_diffusers(tiny_folder(kind), checkpoint, guidance_scale=3.0, negative_prompt=negatives)
    assert psnr_db(ours, theirs) >= 60
    # the negative prompts have an effect
    assert psnr_db(sampled_in_torch(checkpoint), theirs) < 40


def test_a_model_without_its_t5_encoder_is_conditioned_on_zeros(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    gone = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = DiffusionPipeline.from_pretrained(tiny_folder("sd3"), local_files_only=True, **gone)
    pipe.save_pretrained(tmp_path / "sd3")
    checkpoint = with_short_plan(load_checkpoint(tmp_path / "sd3"), steps=3)
    assert psnr_db(sampled_in_torch(checkpoint), sampled_by_diffusers(tmp_path / "sd3", checkpoint, pipe=pipe)) >= 60


@pytest.mark.parametrize("steps", [1, 4])
def test_a_consistency_model_adds_the_noise_of_the_seeds(steps: int, tiny_folder: Callable[..., Path]) -> None:
    checkpoint = with_short_plan(load_checkpoint(tiny_folder("lcm")), steps)
    assert checkpoint.spec.plan.solver == "lcm"
    assert psnr_db(sampled_in_torch(checkpoint), sampled_by_diffusers(tiny_folder("lcm"), checkpoint)) >= 60


@pytest.mark.parametrize("settings", [{}, {"clip_sample": False, "timestep_spacing": "trailing"}])
def test_a_pixel_space_pipeline_reproduces_its_own_ddim_images(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 8}
    model = UNet2DModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, **blocks)
    pipe: Any = DDIMPipeline(model, DDIMScheduler(**settings))
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    checkpoint = with_short_plan(load_checkpoint(tmp_path), steps=10)
    noise = torch.from_numpy(noise_for(SEEDS, checkpoint.spec.sample_shape))
    with mock.patch("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", side_effect=lambda *_, **__: noise.clone()):
        theirs = pipe(batch_size=2, num_inference_steps=10, output_type="np").images.transpose(0, 3, 1, 2)
    ours = generate(TorchNetwork(checkpoint.model, checkpoint.spec), checkpoint.spec, SEEDS)
    assert psnr_db(np.clip(ours, -1, 1) / 2 + 0.5, theirs) >= 60


# --- compression -----------------------------------------------------------------------------------------------


RECIPE = """
teacher_samples: 2
stages:
  - prune: {{kind: depth, blocks: 1, samples: 1}}
  - prune: {{method: {method}, ratio: 0.25, round_to: 4, batch: 2, timesteps: 2}}
  - distill: {{kind: recover, steps: 2, batch: 2}}
  - quantize: {{format: int8, samples: 2, batch: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(method: str) -> Path:
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(method=method))
        return tmp_path / "recipe.yaml"

    return write


# sdxl and lcm have sd's network, and pixart is built from dit's blocks
FAMILIES = {"ldm": "magnitude", "sd": "taylor", "sdxl": "magnitude", "lcm": "magnitude", "dit": "taylor"}
FAMILIES |= dict.fromkeys(("pixart-alpha", "sd3", "flux"), "magnitude")
STREAM_KINDS = ("dit", "pixart-alpha", "sd3", "flux", "sd", "sdxl")
BOTH = [pytest.param(kind, "magnitude", marks=pytest.mark.slow) for kind in ("sd", "dit")]


@pytest.mark.parametrize(("kind", "method"), [*FAMILIES.items(), *BOTH])
def test_every_family_is_pruned_distilled_and_quantized(
    kind: str, method: str, tiny_folder: Callable[..., Path], recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    teacher = with_short_plan(load_checkpoint(tiny_folder(kind)), steps=2)
    result = run_stages(teacher, Recipe.load(recipe(method)), tmp_path / "run")

    before, after = (count(one.model, one.spec) for one in (teacher, result))
    # only inner widths shrink and both heads remain; in tiny Flux most MACs are those of attention
    assert after.parameters < before.parameters and after.macs < 0.97 * before.macs
    assert [record.stage for record in result.history] == ["prune", "prune", "distill", "quantize"]
    assert len(removed_blocks(result.model)) == 1
    assert result.quantization is not None and len(result.quantization.layers) > 5
    model = fake_quantized(result)
    with torch.no_grad():
        out = adapter_for(model).forward(model, dummy_inputs(result.spec, 2))
    assert out.shape == (2, *result.spec.sample_shape) and out.isfinite().all()

    stages = sorted((tmp_path / "run" / "stages").glob("0*"))
    saved = [load_checkpoint(stage) for stage in stages]
    assert [one.hash for one in saved] == [record.after for record in result.history]
    assert saved[-1].hash == result.hash and saved[-1].spec == result.spec
    for name in component_names(saved[-1]):
        component = load_component(saved[-1], name)
        found = component.run_all({k: v.numpy() for k, v in component.examples.items()})
        assert list(found) == component.outputs and all(np.isfinite(array).all() for array in found.values())


LOW_RANK = """
teacher_samples: 2
stages:
  - prune: {method: magnitude, ratio: 0.25, round_to: 4}
  - prune: {kind: low_rank, ratio: 0.7, round_to: 1}
  - prune: {kind: depth, blocks: 1, samples: 1}
  - distill: {kind: recover, steps: 2, batch: 2}
  - quantize: {format: int8, samples: 2, batch: 2, qat: {steps: 1, trajectories: 2}}
"""


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in ("sdxl", "lcm")])
def test_every_family_of_low_rank_is_pruned_distilled_and_quantized(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = with_short_plan(load_checkpoint(tiny_folder(kind)), steps=2)
    (tmp_path / "recipe.yaml").write_text(LOW_RANK)
    # without an engine all layers are replaced that save MACs
    result = run_stages(teacher, Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "run")
    ranks, scales = low_rank_layers(result.model), result.quantization
    assert len(ranks) > 4 and scales is not None
    assert any(f"{name}.{factor}" in scales.layers for name in ranks for factor in ("down", "up"))
    stages = sorted((tmp_path / "run" / "stages").glob("0*"))
    assert [load_checkpoint(stage).hash for stage in stages] == [record.after for record in result.history]
    assert count(result.model, result.spec).macs < count(teacher.model, teacher.spec).macs


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_a_bundle_of_low_rank_agrees_with_torch_in_both_engines(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = with_short_plan(load_checkpoint(tiny_folder(kind)), steps=3)
    small = prune(teacher, PruneLowRankConfig(ratio=0.7, round_to=1), Context(0, tmp_path, teacher))
    assert len(low_rank_layers(small.model)) > 8
    bundle = export_bundle(small, tmp_path / "bundle", ExportConfig(targets=("onnx", "openvino"), threads=1))
    assert set(bundle.manifest["parity"]) == {"onnxruntime", "openvino"}
    expected = sampled_in_torch(small)
    assert psnr_db(expected, sampled_in_torch(teacher)) < 40  # the removed rank has an effect
    words = ("--prompt", PROMPTS[0]) if kind == "sd" else ("--label", LABELS[0])
    for engine in ("onnxruntime", "openvino"):
        file = tmp_path / f"{engine}.png"
        assert (
            run("sample", tmp_path / "bundle", "-n", 1, "--out", file, "--threads", 1, "--engine", engine, *words) == 0
        )
        assert psnr_db(picture(file), expected[:1]) >= 40


# --- through the command line ----------------------------------------------------------------------------------


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def picture(file: Path) -> np.ndarray:
    """Read a PNG of one image as [1, 3, H, W] in [0, 1]."""
    return np.asarray(Image.open(file).convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 255


@pytest.fixture
def sampled_image(sd_bundle: Path, tmp_path: Path) -> Callable[..., np.ndarray]:
    """Sample one image of the bundle on the command line."""
    file = tmp_path / "image.png"

    def sample_image(*arguments: object, prompt: str = PROMPTS[0]) -> np.ndarray:
        assert run("sample", sd_bundle, "-n", 1, "--out", file, "--threads", 1, "--prompt", prompt, *arguments) == 0
        return picture(file)

    return sample_image


def test_a_bundle_sampled_on_the_command_line_matches_diffusers(
    tiny_folder: Callable[..., Path], sampled_image: Callable[..., np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--negative", "dog", "--steps", 4, "--guidance", 3, "--engine", "onnxruntime")
    checkpoint = with_short_plan(load_checkpoint(tiny_folder("sd")), steps=4)
    guidance = {"guidance_scale": 3.0, "negative_prompt": ["dog"]}
    assert psnr_db(sampled_image(*arguments), sampled_by_diffusers(tiny_folder("sd"), checkpoint, 1, **guidance)) >= 40
    assert "4 steps of ddim in onnxruntime" in capsys.readouterr().out

    # another solver, with the timestep spacing of the model's own scheduler
    pipe = DiffusionPipeline.from_pretrained(tiny_folder("sd"), local_files_only=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    theirs = sampled_by_diffusers(tiny_folder("sd"), checkpoint, 1, pipe=pipe, **guidance)
    assert psnr_db(sampled_image(*arguments, "--solver", "euler"), theirs) >= 40


@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_one_bundle_samples_several_sizes_and_its_engines_agree(
    size: tuple[int, int], sampled_image: Callable[..., np.ndarray], tiny_folder: Callable[..., Path]
) -> None:
    arguments = ("--steps", 4, "--size", f"{size[0]}x{size[1]}", "--engine")
    one = sampled_image(*arguments, "onnxruntime")
    assert one.shape == (1, 3, *size)
    checkpoint = with_short_plan(load_checkpoint(tiny_folder("sd")), steps=4)
    checkpoint = checkpoint.evolve(spec=resized(checkpoint.spec, size))
    assert psnr_db(one, sampled_by_diffusers(tiny_folder("sd"), checkpoint, 1)) >= 40
    pytest.importorskip("openvino")
    assert psnr_db(sampled_image(*arguments, "openvino"), one) >= 40


BLOCKED = ("torch", "transformers", "diffusers")
ALONE = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
for name in {BLOCKED}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{{name}} can be imported: the test is void")
from diffpress.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_prompt_becomes_an_image_without_torch_transformers_and_diffusers(
    sd_bundle: Path, sampled_image: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    arguments = ["-n", "1", "--prompt", PROMPTS[0], "--steps", "2", "--engine", "onnxruntime", "--threads", "1"]
    command = [sys.executable, "-c", ALONE, "sample", str(sd_bundle), "--out", str(tmp_path / "alone.png"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(picture(tmp_path / "alone.png"), sampled_image("--steps", 2, "--engine", "onnxruntime"))


def test_a_prompt_longer_than_the_tokenizers_limit_is_truncated_with_a_warning(
    sampled_image: Callable[..., np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    fitting = " ".join(["cat"] * (CLIP_TOKENS - 2))  # the start and end markers are one token each
    expected = sampled_image("--steps", 2, prompt=fitting)
    assert capsys.readouterr().err == ""
    assert np.array_equal(sampled_image("--steps", 2, prompt=f"{fitting} red dog"), expected)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1 and "left out 'red dog'" in warning


# --- invalid input ---------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Assert that the command exits with code 2 and one line on stderr that contains each of `words`."""

    def check(command: Sequence[object], *words: str) -> None:
        capsys.readouterr()
        code, error = run(*command), capsys.readouterr().err
        assert code == 2 and error.startswith("diffpress: ") and error.count("\n") == 1, error
        assert all(word in error for word in words), error

    return check


@pytest.fixture
def copied(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a tiny pipeline, for a test to damage."""
    return lambda kind: shutil.copytree(tiny_folder(kind), tmp_path / "damaged" / kind)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_refused_by_name(
    component: str, copied: Callable[[str], Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    folder = copied("sd")
    shutil.rmtree(folder / component)
    refused(("export", folder, "--out", tmp_path / "out"), str(folder), f"'{component}'", "missing")


def test_a_decoder_with_other_latent_channels_is_refused(
    copied: Callable[[str], Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    folder = copied("sd")
    edit(folder / "vae" / "config.json", latent_channels=16)
    refused(("export", folder, "--out", tmp_path / "out"), "4 latent channels", "vae decodes 16")


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "{"), ("tokenizer.json", '{"model": 3}'), ("tokenizer_config.json", "[]")]
)
def test_a_damaged_tokenizer_is_refused(
    file: str, content: str, copied: Callable[[str], Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    folder = copied("sd")
    (folder / "tokenizer" / file).write_text(content)
    refused(("export", folder, "--out", tmp_path / "out"), str(folder / "tokenizer"))


def test_a_tokenizer_without_a_vocabulary_is_refused(
    copied: Callable[[str], Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    folder = copied("sd")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    refused(("export", folder, "--out", tmp_path / "out"), str(folder / "tokenizer"), "vocab.json")


def test_an_unknown_class_is_named_with_the_alternative(
    copied: Callable[[str], Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    folder = copied("sd")
    edit(folder / "unet" / "config.json", _class_name="KandinskyUNet")
    edit(folder / "model_index.json", _class_name="KandinskyPipeline", unet=["diffusers", "KandinskyUNet"])
    words = ("'KandinskyUNet'", "KandinskyPipeline", "file.py:weights")
    refused(("export", folder, "--out", tmp_path / "out"), *words)


def test_an_impossible_size_names_the_nearest_possible_one(
    sd_bundle: Path, refused: Callable[..., None], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    export = ("export", tiny_folder("sd"), "--out", tmp_path / "out")
    for command in (("sample", sd_bundle, "--prompt", "a cat"), export):
        refused((*command, "--size", "30x18"), "30x18", "multiples of 4", "32x16")
        refused((*command, "--size", "large"), "--size large", "512x768")


def test_a_denoiser_exported_alone_accepts_no_prompt_and_no_other_size(
    refused: Callable[..., None], tmp_path: Path
) -> None:
    out, image = tmp_path / "bare", tmp_path / "latents.npy"
    blocks: dict[str, Any] = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    model: Any = unet(block_out_channels=[16], mid_block_type=None, **blocks)
    model.save_pretrained(tmp_path / "sd" / "unet")
    assert run("export", tmp_path / "sd" / "unet", "--out", out, "--size", "8x8", "--threads", 1) == 0
    sample = ("sample", out, "-n", 1, "--out", image, "--prompt", "a cat")
    refused(sample, str(out), "text encoder", "whole pipeline")
    refused((*sample, "--size", "16x16"), "16x16", "8x8")
    assert not image.exists()


def test_prompts_that_a_model_does_not_accept_are_refused(sd_bundle: Path, refused: Callable[..., None]) -> None:
    refused(("sample", sd_bundle), "--prompt")
    refused(("sample", sd_bundle, "--prompt", "a cat", "--negative", "dog", "--guidance", 1), "negative", "guidance")


# --- complete pipeline, every kind -----------------------------------------------------------------------------


STREAM = """
teacher_samples: 2
stages:
  - prune: {method: magnitude, ratio: 0.5, round_to: 4, residual: true}
  - distill: {kind: recover, steps: 1, batch: 2}
gates: {parity_sqnr_db: 60}  # in float: int8 would measure its own rounding
"""
STREAMS = [pytest.param(kind, marks=() if kind == "dit" else pytest.mark.slow) for kind in STREAM_KINDS]


@pytest.mark.parametrize("kind", STREAMS)
def test_a_network_with_a_narrower_residual_stream_is_exported_and_sampled(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out, image = tmp_path / "teacher", tmp_path / "out", tmp_path / "image.png"
    teacher = with_short_plan(load_checkpoint(tiny_folder(kind)), steps=2)
    save_checkpoint(teacher, folder)
    (tmp_path / "recipe.yaml").write_text(STREAM)
    assert run("compress", folder, "--recipe", tmp_path / "recipe.yaml", "--out", out) == 0  # the gate is met
    small = load_checkpoint(out / "checkpoint")
    before, after = (count(one.model, one.spec) for one in (teacher, small))
    # without the stream, half of the inner widths and heads leave about half of the parameters
    assert after.parameters < 0.45 * before.parameters
    conditioning = {"text": ("--prompt", PROMPTS[0]), "class": ("--label", LABELS[0])}
    sample = ("-n", 1, "--out", image, "--engine", "onnxruntime", *conditioning[teacher.spec.conditioning.kind])
    assert run("sample", out / "bundle", *sample) == 0
    assert picture(image).std() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_compressed_exported_and_sampled(
    kind: str, tiny_folder: Callable[..., Path], recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out, image = tmp_path / "teacher", tmp_path / "out", tmp_path / "image.png"
    teacher = with_short_plan(load_checkpoint(tiny_folder(kind)), steps=3)
    save_checkpoint(teacher, folder)
    assert run("compress", folder, "--recipe", recipe("magnitude"), "--out", out) == 0
    conditioning = {"text": ("--prompt", PROMPTS[0]), "class": ("--label", LABELS[0]), "none": ()}
    sample = ("-n", 1, "--out", image, "--engine", "onnxruntime", *conditioning[teacher.spec.conditioning.kind])

    assert run("sample", out / "baseline", *sample) == 0
    theirs = sampled_by_diffusers(tiny_folder(kind), teacher, 1)
    assert psnr_db(picture(image), theirs) >= 40
    image.unlink()
    assert run("sample", out / "bundle", *sample) == 0
    assert picture(image).shape == theirs.shape and picture(image).std() > 0.02
