"""ControlNets end to end: diffpress' images against those of diffusers for the same folders, images and noise.

If torch runs the networks, only the order of float32 additions differs: 90 dB PSNR is far above what a wrong formula
reaches. If an engine runs them, the bound is 40 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import HeunDiscreteScheduler  # noqa: E402
from PIL import Image  # noqa: E402

import diffpress as dp  # noqa: E402
from diffpress.cli.main import main  # noqa: E402
from diffpress.compress.checkpoint import save_checkpoint  # noqa: E402
from diffpress.compress.context import Context  # noqa: E402
from diffpress.compress.models.control_network import load_controlnet  # noqa: E402
from diffpress.compress.pruning.config import PruneConfig, PruneDepthConfig  # noqa: E402
from diffpress.compress.pruning.prune import prune  # noqa: E402
from diffpress.compress.sources.controlnet import control_sources  # noqa: E402
from diffpress.compress.sources.load import load_checkpoint  # noqa: E402
from diffpress.runtime.engines import available  # noqa: E402
from diffpress.runtime.image_inputs.control import ControlRequest, read_control_request  # noqa: E402
from diffpress.runtime.image_size import resized  # noqa: E402
from diffpress.runtime.sampler import generate  # noqa: E402
from tests import image_inputs  # noqa: E402
from tests.against_diffusers import PROMPTS, psnr_db, sampled_in_torch, with_short_plan  # noqa: E402
from tests.controlnets import (  # noqa: E402
    controlled_by_diffusers,
    controlled_pipeline,
    in_torch,
    pictures,
    request,
    tiny_controlnet,
)
from tests.pipelines import KINDS, SD_BETAS, sd_inpaint  # noqa: E402

ENGINES = [name for name in ("onnxruntime", "openvino") if name in available()]
TARGETS = ["onnx", *(name for name in ENGINES if name == "openvino")]

RECIPE = """
teacher_samples: 2
stages:
  - prune: {{method: magnitude, ratio: 0.25, round_to: 4, residual: true}}
  - prune: {{kind: depth, blocks: 1, samples: 1}}
  - quantize: {{format: int8, samples: 2, batch: 2}}
export: {{targets: [{targets}], controlnet: [{controlnet}], threads: 1}}
"""

Folders = Callable[..., Path]  # kind, seed -> folder


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def controlnet(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folder of a tiny ControlNet for a kind of pipeline, made once per kind and seed; do not modify."""
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            path = tmp_path_factory.mktemp(f"{kind}-controlnet") / str(seed)
            made[kind, seed] = tiny_controlnet(tiny_folder(kind), path, seed)
        return made[kind, seed]

    return folder


# --- in torch --------------------------------------------------------------------------------------------------


CASES = [
    ("sd", 1, {}),
    ("sd", 1, {"scale": 0.6, "start": 0.2, "end": 0.7}),
    ("sd", 2, {"scale": [0.8, 0.3], "start": [0.0, 0.4], "end": [0.5, 1.0]}),
    ("sd2-v", 1, {"scale": 1.5}),
    ("sdxl", 1, {"end": 0.6}),
    ("lcm", 1, {"start": 0.3}),
]


@pytest.mark.parametrize(("kind", "networks", "numbers"), CASES)
def test_control_reproduces_diffusers(
    kind: str, networks: int, numbers: dict[str, Any], tiny_folder: Callable[..., Path], controlnet: Folders
) -> None:
    checkpoint = with_short_plan(load_checkpoint(tiny_folder(kind)), 5)
    folders, wanted = [controlnet(kind, seed) for seed in range(networks)], request(checkpoint, networks, **numbers)
    ours = sampled_in_torch(checkpoint, control=in_torch(checkpoint, folders, wanted))
    assert psnr_db(ours, controlled_by_diffusers(tiny_folder(kind), checkpoint, folders, wanted)) >= 90
    assert psnr_db(ours, sampled_in_torch(checkpoint)) < 45, "the ControlNet changes nothing"


def test_the_image_matters(tiny_folder: Callable[..., Path], controlnet: Folders) -> None:
    checkpoint = with_short_plan(load_checkpoint(tiny_folder("sd")), 5)
    first, both = request(checkpoint), request(checkpoint, 2)
    other = ControlRequest(both.images[1:])
    images = [sampled_in_torch(checkpoint, control=in_torch(checkpoint, [controlnet("sd")], r)) for r in (first, other)]
    assert psnr_db(*images) < 50


@pytest.mark.parametrize(("kind", "masked"), [("sd", False), ("sd", True), ("sd-inpaint", True)])
def test_control_of_image_to_image_and_inpainting_reproduces_diffusers(
    kind: str, masked: bool, tiny_folder: Callable[..., Path], controlnet: Folders
) -> None:
    folder = tiny_folder("sd") if kind == "sd" else tiny_folder(sd_inpaint, kind)
    checkpoint = with_short_plan(load_checkpoint(folder), 6)
    images = image_inputs.request(checkpoint.spec.image_size, 0.7, masked)
    # 4 of 6 steps are run: the window is a share of these
    wanted = request(checkpoint, scale=0.8, start=0.3, end=0.8)
    ours = image_inputs.sampled_in_torch(checkpoint, images, in_torch(checkpoint, [controlnet("sd")], wanted))
    options = {
        "pipe": controlled_pipeline(folder, [controlnet("sd")], "Inpaint" if masked else "Img2Img"),
        "control_image": [Image.fromarray(pixels) for pixels in wanted.given[0].pixels],
        "controlnet_conditioning_scale": 0.8,
        "control_guidance_start": 0.3,
        "control_guidance_end": 0.8,
    }
    assert psnr_db(ours, image_inputs.sampled_by_diffusers(folder, checkpoint, images, **options)) >= 90
    assert psnr_db(ours, image_inputs.sampled_in_torch(checkpoint, images)) < 45, "the ControlNet changes nothing"


def test_a_window_counts_the_evaluations_of_a_solver_that_has_two_in_a_step(
    tiny_folder: Callable[..., Path], controlnet: Folders
) -> None:
    def heun() -> Any:
        pipe: Any = KINDS["sd"]()
        pipe.scheduler = HeunDiscreteScheduler(**SD_BETAS, steps_offset=1)
        return pipe

    folder = tiny_folder(heun, "sd-heun")
    checkpoint = with_short_plan(load_checkpoint(folder), 4)
    wanted = request(checkpoint, start=0.25, end=0.75)
    ours = sampled_in_torch(checkpoint, control=in_torch(checkpoint, [controlnet("sd")], wanted))
    assert psnr_db(ours, controlled_by_diffusers(folder, checkpoint, [controlnet("sd")], wanted)) >= 90


# --- pruned ----------------------------------------------------------------------------------------------------


PRUNED: dict[str, Any] = {
    "inner": PruneConfig(method="magnitude", ratio=0.3, round_to=4),
    "residual": PruneConfig(method="magnitude", ratio=0.3, round_to=4, residual=True),
    "depth": PruneDepthConfig(remove=("down_blocks.0.resnets.0", "mid_block.resnets.1")),
}
# what writes the skip connections and the middle of tiny U-Nets
WRITERS = (
    "conv_in",
    "down_blocks.0.resnets.0.conv2",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv2",
    "mid_block.resnets.1.conv2",
)


@pytest.mark.parametrize("how", PRUNED)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_pruned_u_net_gets_the_residuals_of_the_channels_that_it_kept(
    kind: str, how: str, tiny_folder: Callable[..., Path], controlnet: Folders, tmp_path: Path
) -> None:
    whole = with_short_plan(load_checkpoint(tiny_folder(kind)), 2)
    small = prune(whole, PRUNED[how], Context(0, tmp_path, whole))
    save_checkpoint(small, tmp_path / "small")
    small = load_checkpoint(tmp_path / "small")
    (source,) = control_sources(small, [str(controlnet(kind))])
    network = load_controlnet(small, source)
    found = network.run_all(network.example_arrays)
    expected = load_controlnet(whole, source).run_all(network.example_arrays)
    assert list(found) == list(expected) and len(found) == len(WRITERS)
    for (name, array), writer in zip(found.items(), WRITERS, strict=True):
        before, after = (dict(one.model.named_parameters()).get(f"{writer}.bias") for one in (whole, small))
        assert before is not None
        # random biases identify channels; nothing else was removed with a block
        kept = range(len(before)) if after is None else [before.tolist().index(value) for value in after.tolist()]
        assert (how == "residual") == (len(kept) < len(before)) and np.array_equal(array, expected[name][:, kept])
    wanted = request(small)
    images = sampled_in_torch(small, control=in_torch(small, [controlnet(kind)], wanted))
    assert psnr_db(images, sampled_in_torch(small)) < 45


# --- exported --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(
    tiny_folder: Callable[..., Path], controlnet: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Bundle of a tiny pipeline with ControlNets, made once per kind; do not modify."""
    made: dict[tuple[str, int], Path] = {}

    def bundle(kind: str, networks: int = 1) -> Path:
        if (kind, networks) not in made:
            out = tmp_path_factory.mktemp(kind) / "bundle"
            words: list[object] = ["export", tiny_folder(kind), "--out", out, "--targets", *TARGETS, "--threads", 1]
            words += [word for seed in range(networks) for word in ("--controlnet", controlnet(kind, seed))]
            assert main([str(word) for word in words]) == 0
            made[kind, networks] = out
        return made[kind, networks]

    return bundle


def arrays(images: Any) -> np.ndarray:
    """Return PIL images as an array in [0, 1], [N, 3, H, W]."""
    return np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2) / 255


EXPORTED = [
    ("sd", 1, {"control_scale": 0.8, "control_end": 0.6}),
    ("sd", 2, {"control_scale": [0.7, 0.4], "control_start": [0.0, 0.3]}),
    ("sdxl", 1, {"control_scale": 0.8}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "networks", "numbers"), EXPORTED)
def test_one_bundle_follows_control_images_of_several_sizes_in_every_engine(
    kind: str,
    networks: int,
    numbers: dict[str, Any],
    exported: Callable[..., Path],
    tiny_folder: Callable[..., Path],
    controlnet: Folders,
) -> None:
    whole, folders = (
        with_short_plan(load_checkpoint(tiny_folder(kind)), 4),
        [controlnet(kind, k) for k in range(networks)],
    )
    plain = {}
    for size in ((16, 16), (24, 32)):
        checkpoint = whole.evolve(spec=resized(whole.spec, size))
        wanted = request(checkpoint, networks, **{name.removeprefix("control_"): n for name, n in numbers.items()})
        theirs = controlled_by_diffusers(tiny_folder(kind), checkpoint, folders, wanted)
        images = [image.pixels for image in wanted.given]
        given: dict[str, Any] = {"control_image": images if networks > 1 else images[0], "seeds": [0, 1], "steps": 4}
        for engine in ENGINES:
            with dp.Pipeline(exported(kind, networks), engine=engine, threads=1) as pipe:
                assert psnr_db(arrays(pipe(PROMPTS, **given, **numbers)), theirs) >= 40, (size, engine)
                plain[engine] = arrays(pipe(PROMPTS, seeds=[0, 1], steps=4, size=size))
                assert psnr_db(plain[engine], theirs) < 45, "the ControlNets change nothing"
                zero = arrays(pipe(PROMPTS, **given, control_scale=0.0))
                assert np.array_equal(zero, plain[engine])


@pytest.mark.slow
def test_scale_zero_evaluates_the_plain_graph_alone(exported: Callable[..., Path]) -> None:
    with dp.Pipeline(exported("sd"), engine="onnxruntime", threads=1) as pipe:
        spec = pipe.spec.with_plan(pipe.spec.plan.over(pipe.spec.plan.timesteps[:3]))
        conditions = pipe.conditions(1, spec, prompts=["a cat"])
        plain = generate(pipe.denoiser, spec, [3], conditions=conditions)
        for scale, equal in ((0.0, True), (1e-3, False)):
            wanted = read_control_request([pictures((16, 16))[0]], scale)
            assert wanted is not None
            control = pipe.control(wanted, 1)
            found = generate(pipe.denoiser, spec, [3], conditions=replace(conditions, control=control))
            assert np.array_equal(found, plain) == equal


@pytest.mark.slow
def test_the_command_line_makes_the_images_of_python(
    exported: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, image = tmp_path / "out", pictures((16, 24))[0]
    Image.fromarray(image).save(tmp_path / "pose.png")
    words: list[object] = ["sample", exported("sd"), "--prompt", PROMPTS[0], "-n", 2, "--steps", 4, "--threads", 1]
    words += ["--engine", "onnxruntime", "--out", f"{out}/", "--control-image", tmp_path / "pose.png"]

    def run(*more: object) -> int:
        return main([str(word) for word in (*words, *more)])

    assert run("--control-scale", 0.8, "--control-start", 0.2, "--control-end", 0.9) == 0
    given: dict[str, Any] = {"control_scale": 0.8, "control_start": 0.2, "control_end": 0.9}
    with dp.Pipeline(exported("sd"), engine="onnxruntime", threads=1) as pipe:
        expected: Any = pipe(PROMPTS[0], seeds=[0, 1], steps=4, control_image=image, **given)
    for seed in (0, 1):
        assert np.array_equal(np.asarray(Image.open(out / f"{seed:06}.png")), np.asarray(expected[seed]))
    # finished images are kept, unless the control has changed
    assert run("--control-scale", 0.8, "--control-start", 0.2, "--control-end", 0.9) == 0
    for more in (("--control-scale", 0.7), ("--size", "16x16"), ("--control-image", tmp_path / "pose.png")):
        capsys.readouterr()
        assert run(*more) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_pruned_and_quantized_u_net_follows_control_images(
    tiny_folder: Callable[..., Path], controlnet: Folders, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(controlnet=controlnet("sd"), targets=", ".join(TARGETS)))
    words = ("compress", tiny_folder("sd"), "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert main([str(word) for word in words]) == 0
    bundle = dp.load_bundle(tmp_path / "run")
    assert "controlnet" not in dp.load_bundle(tmp_path / "run" / "baseline").manifest["graphs"]
    graph = bundle.manifest["graphs"]["denoiser"]
    assert graph["precision"] == "int8" and graph["control_networks"] == ["controlnet"]
    small = with_short_plan(load_checkpoint(tmp_path / "run" / "checkpoint"), 4)
    wanted = request(small)
    torch_images = sampled_in_torch(small, control=in_torch(small, [controlnet("sd")], wanted))
    for engine in ENGINES:
        with dp.Pipeline(bundle, engine=engine, threads=1) as pipe:
            given: dict[str, Any] = {"seeds": [0, 1], "steps": 4}
            found = arrays(pipe(PROMPTS, control_image=wanted.given[0].pixels, **given))
            plain = arrays(pipe(PROMPTS, **given))
            zero = arrays(pipe(PROMPTS, control_image=wanted.given[0].pixels, control_scale=0.0, **given))
            # int8 is nearer to the float model under control than to itself without
            assert psnr_db(found, torch_images) > psnr_db(plain, torch_images) + 6
            assert np.array_equal(plain, zero)
