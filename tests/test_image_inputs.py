"""Image to image and inpainting end to end: diffpress' images against those of diffusers for the same folder.

Both sides use the same weights, images, masks, noise, prompts and scheduler. If torch runs the networks, only the order
of float32 additions differs: 90 dB PSNR is far above what a wrong formula reaches, and far below the measured 125 dB
and more. If an engine runs them, the bound is 40 dB.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel  # noqa: E402
from PIL import Image  # noqa: E402

import diffpress as dp  # noqa: E402
from diffpress.cli.main import main  # noqa: E402
from diffpress.compress.sources.load import load_checkpoint  # noqa: E402
from diffpress.runtime.engines import available  # noqa: E402
from diffpress.runtime.errors import InvalidInputError  # noqa: E402
from diffpress.runtime.image_size import resized  # noqa: E402
from tests.against_diffusers import PROMPTS, psnr_db, with_short_plan  # noqa: E402
from tests.image_inputs import (  # noqa: E402
    INPAINTING,
    PREFIXES,
    masks,
    pictures,
    request,
    sampled_by_diffusers,
    sampled_by_scheduler,
    sampled_in_torch,
)

SLOW = ("sd2-v", "sd3.5", "flux-schnell")  # like the others, with other settings
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in PREFIXES]
ENGINES = [name for name in ("onnxruntime", "openvino") if name in available()]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- in torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "strength"), [(5, 0.5), (3, 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_image_to_image_reproduces_diffusers(
    kind: str, steps: int, strength: float, tiny_folder: Callable[..., Path]
) -> None:
    # 5 steps with strength 0.5 are 2 steps for variance-preserving models, and 3 for flow models
    checkpoint = with_short_plan(load_checkpoint(tiny_folder(kind)), steps)
    images = request(checkpoint.spec.image_size, strength)
    assert (
        psnr_db(sampled_in_torch(checkpoint, images), sampled_by_diffusers(tiny_folder(kind), checkpoint, images)) >= 90
    )


@pytest.mark.parametrize(("steps", "strength"), [(5, 0.5), (3, 1.0)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values != ("lcm",)])  # diffusers has no such pipeline
def test_inpainting_reproduces_diffusers(
    kind: str, steps: int, strength: float, tiny_folder: Callable[..., Path]
) -> None:
    checkpoint = with_short_plan(load_checkpoint(tiny_folder(kind)), steps)
    images = request(checkpoint.spec.image_size, strength, masked=True)
    assert (
        psnr_db(sampled_in_torch(checkpoint, images), sampled_by_diffusers(tiny_folder(kind), checkpoint, images)) >= 90
    )


@pytest.mark.parametrize("kind", ["ldm", "ldm-kl", "dit"])
def test_models_whose_pipelines_take_no_image_follow_their_scheduler(
    kind: str, tiny_folder: Callable[..., Path]
) -> None:
    checkpoint = with_short_plan(load_checkpoint(tiny_folder(kind)), 5, guidance=1.0)
    pipe = DiffusionPipeline.from_pretrained(tiny_folder(kind), local_files_only=True)
    images = request(checkpoint.spec.image_size, 0.6)
    assert psnr_db(sampled_in_torch(checkpoint, images), sampled_by_scheduler(pipe, checkpoint, images)) >= 90


def test_pixel_models_start_from_pixels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 8}
    model = UNet2DModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, **blocks)
    pipe: Any = DDIMPipeline(model, DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    checkpoint = with_short_plan(load_checkpoint(tmp_path), steps=10)
    images = request((8, 8), 0.7)
    ours = sampled_in_torch(checkpoint, images)
    assert psnr_db(ours, sampled_by_scheduler(pipe, checkpoint, images)) >= 90
    masked = sampled_in_torch(checkpoint, request((8, 8), 0.7, masked=True))
    kept = ~np.broadcast_to(masks((8, 8))[:, None], masked.shape)
    assert np.abs(masked - images.pixels.transpose(0, 3, 1, 2) / 255)[kept].max() < 1e-6


SCHEDULERS = [
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DDPMScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
]
TWICE = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)  # diffusers applies the mask between two evaluations as well


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_every_solver_starts_in_the_middle_of_its_plan_as_its_scheduler_does(
    name: str, settings: dict[str, Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("sd"), tmp_path / "sd")
    pipe: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)
    # 20 steps take the higher orders, of which 9 remain: with as few steps the order would fall at the end
    checkpoint = with_short_plan(load_checkpoint(folder), 20)
    for masked in (False,) if name in TWICE else (False, True):
        images = request((16, 16), 0.45, masked)
        theirs = sampled_by_diffusers(folder, checkpoint, images, pipe=pipe)
        assert psnr_db(sampled_in_torch(checkpoint, images), theirs) >= 90


# --- networks that are trained for inpainting --------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "strength"), [(5, 0.5), (3, 1.0)])
@pytest.mark.parametrize("kind", INPAINTING)
def test_a_network_that_reads_the_masked_image_reproduces_diffusers(
    kind: str, steps: int, strength: float, tiny_folder: Callable[..., Path]
) -> None:
    checkpoint = with_short_plan(load_checkpoint(built(kind, tiny_folder)), steps)
    images = request(checkpoint.spec.image_size, strength, masked=True)
    theirs = sampled_by_diffusers(built(kind, tiny_folder), checkpoint, images)
    assert psnr_db(sampled_in_torch(checkpoint, images), theirs) >= 90


STAGES = [
    dp.Prune(method="magnitude", ratio=0.25, round_to=4),
    dp.Recover(steps=1, batch=2),
    dp.Quantize("int8", samples=2, batch=2),
]


@pytest.mark.parametrize("kind", ["sd-inpaint", pytest.param("flux-fill", marks=pytest.mark.slow)])
def test_a_network_that_reads_the_masked_image_is_compressed_saved_and_exported(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = with_short_plan(load_checkpoint(built(kind, tiny_folder)), 2)
    small = dp.compress(teacher, STAGES, out=tmp_path / "work")
    assert small.quantization is not None and small.spec.conditioning.inpainting
    last = sorted((tmp_path / "work" / "stages").glob("0*"))[-1]
    assert load_checkpoint(last).hash == small.hash and load_checkpoint(last).spec == small.spec
    bundle = dp.export(small, tmp_path / "bundle", threads=1)
    assert bundle.manifest["requires"] == ["inpainting"] and "vae_encoder" in bundle.manifest["graphs"]
    with dp.Pipeline(bundle, engine="onnxruntime", threads=1) as pipe:
        size = teacher.spec.image_size
        found: Any = pipe(PROMPTS, image=pictures(size), mask=list(masks(size)), overlay=True)
        for image, picture, mask in zip(found, pictures(size), masks(size), strict=True):
            assert np.array_equal(np.asarray(image)[~mask], picture[~mask])
        incomplete: tuple[dict[str, Any], ...] = ({}, {"image": pictures(size)})
        for given in incomplete:
            with pytest.raises(InvalidInputError, match="inpainting and needs an image and a mask"):
                pipe(PROMPTS, **given)


# --- in engines ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundle of a tiny pipeline with its encoder, made once per kind; do not modify."""
    made: dict[str, Path] = {}

    def bundle(kind: str) -> Path:
        if kind not in made:
            out = tmp_path_factory.mktemp(kind) / "bundle"
            targets = ["onnx", *(["openvino"] if "openvino" in ENGINES else [])]
            made[kind] = dp.export(built(kind, tiny_folder), out, targets=targets, threads=1, image_inputs=True).path
        return made[kind]

    return bundle


def built(kind: str, tiny_folder: Callable[..., Path]) -> Path:
    """Return the folder of a tiny pipeline, of KINDS or for inpainting."""
    return tiny_folder(kind) if kind in PREFIXES else tiny_folder(INPAINTING[kind][1], kind)


EVERY = [pytest.param(kind, marks=() if kind == "sd" else pytest.mark.slow) for kind in (*PREFIXES, *INPAINTING)]


@pytest.mark.parametrize("kind", EVERY)
def test_one_bundle_starts_from_images_of_several_sizes_in_every_engine(
    kind: str, exported: Callable[[str], Path], tiny_folder: Callable[..., Path]
) -> None:
    whole = with_short_plan(load_checkpoint(built(kind, tiny_folder)), 4)
    cases = [((16, 16), kind in INPAINTING), ((32, 32), kind != "lcm"), ((24, 32), kind in INPAINTING)]
    expected = [
        sampled_by_diffusers(
            built(kind, tiny_folder), whole.evolve(spec=resized(whole.spec, size)), request(size, 0.6, masked)
        )
        for size, masked in cases
    ]
    for engine in ENGINES:
        with dp.Pipeline(exported(kind), engine=engine, threads=1) as pipe:
            for (size, masked), theirs in zip(cases, expected, strict=True):
                mask = list(masks(size)) if masked else None
                found: Any = pipe(PROMPTS, seeds=[0, 1], steps=4, image=pictures(size), mask=mask, strength=0.6)
                ours = np.stack([np.asarray(image) for image in found]).transpose(0, 3, 1, 2) / 255
                assert psnr_db(ours, theirs) >= 40, (size, masked, engine)


def test_the_command_line_makes_the_images_of_python(exported: Callable[[str], Path], tmp_path: Path) -> None:
    bundle, out = exported("sd"), tmp_path / "out"
    Image.fromarray(pictures((16, 24))[0]).save(tmp_path / "in.png")
    Image.fromarray(masks((16, 24))[0]).save(tmp_path / "mask.png")
    files = ("--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "--strength", 0.6, "--overlay")
    words = ("sample", bundle, "--prompt", PROMPTS[0], "-n", 2, "--steps", 5, "--engine", "onnxruntime", "--threads", 1)

    def run(*more: object) -> int:
        return main([str(word) for word in (*words, *more)])

    assert run("--out", f"{out}/", *files) == 0
    with dp.Pipeline(bundle, engine="onnxruntime", threads=1) as pipe:
        given: dict[str, Any] = {
            "image": tmp_path / "in.png",
            "mask": masks((16, 24))[0],
            "strength": 0.6,
            "overlay": True,
        }
        expected: Any = pipe(PROMPTS[0], seeds=[0, 1], steps=5, **given)
        plain: Any = pipe(PROMPTS[0], seeds=[0, 1], steps=5, **given | {"overlay": False})
    for seed in (0, 1):
        found = np.asarray(Image.open(out / f"{seed:06}.png"))
        assert np.array_equal(found, np.asarray(expected[seed]))
        kept = ~masks((16, 24))[0]
        assert np.array_equal(found[kept], pictures((16, 24))[0][kept])
        assert np.array_equal(found[~kept], np.asarray(plain[seed])[~kept])
        assert not np.array_equal(np.asarray(plain[seed])[kept], found[kept])

    # finished images are kept, unless what they started from has changed
    before = (out / "000000.png").stat().st_mtime_ns
    assert run("--out", f"{out}/", *files) == 0
    assert (out / "000000.png").stat().st_mtime_ns == before
    assert run("--out", f"{out}/", *files[:4], "--strength", 0.8) == 2


def test_a_list_of_images_gives_one_result_for_each(exported: Callable[[str], Path]) -> None:
    with dp.Pipeline(exported("sd"), engine="onnxruntime", threads=1) as pipe:
        both: Any = pipe(PROMPTS[0], image=list(pictures((16, 16))), strength=0.5, steps=2)
        second: Any = pipe(PROMPTS[0], image=pictures((16, 16))[1], strength=0.5, steps=2, seeds=1)
    assert len(both) == 2 and np.array_equal(np.asarray(both[1]), np.asarray(second[0]))
