"""The Python interface, from a folder to images: what the functions return, keep, and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import diffpress as dp  # noqa: E402
from diffpress.runtime.sampler import Step  # noqa: E402

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "runtime" / "tiny_bundle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pixel model: three classes and a null label."""
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("model")
    model: Any = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    model.save_pretrained(made / "unet")
    scheduler: Any = DDIMScheduler(num_train_timesteps=50)
    scheduler.save_pretrained(made / "scheduler")
    (made / "diffpress.json").write_text('{"conditioning": {"kind": "class", "classes": 3, "null_label": 3}}')
    return made


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dp.Checkpoint:
    stages = [dp.Prune(method="magnitude", ratio=0.5, round_to=4), dp.Schedule(solver="ddim", steps=3)]
    return dp.compress(folder, stages, out=tmp_path_factory.mktemp("work") / "run")


@pytest.fixture(scope="module")
def bundle(small: dp.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dp.export(small, tmp_path_factory.mktemp("bundles") / "bundle", threads=1).path


def test_stages_run_in_order_and_shrink_the_model(folder: Path, small: dp.Checkpoint) -> None:
    before, after = (sum(p.numel() for p in c.model.parameters()) for c in (dp.load(folder), small))
    assert [record.stage for record in small.history] == ["prune", "schedule"] and after < 0.6 * before
    assert small.spec.plan.solver == "ddim" and small.spec.plan.steps == 3


def test_library_calls_print_nothing_and_log_their_progress(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="diffpress"):
        student = dp.compress(folder, [dp.Schedule(solver="ddim", steps=3)], out=tmp_path / "run")
        dp.export(student, tmp_path / "bundle", threads=1)
        with dp.Pipeline(tmp_path / "bundle") as pipe:
            pipe(seeds=0)
    assert capfd.readouterr() == ("", "")
    assert caplog.messages[0] == "[1/1] schedule"


def test_the_same_call_again_reads_what_is_finished(
    folder: Path, small: dp.Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = [dp.Prune(method="magnitude", ratio=0.5, round_to=4), dp.Schedule(solver="ddim", steps=3)]
    first = dp.compress(dp.load(folder), stages, out=str(tmp_path / "run"))
    with caplog.at_level("INFO", logger="diffpress"):
        again = dp.compress(str(folder), stages, out=tmp_path / "run")
    assert first.hash == again.hash == small.hash and caplog.text.count("done before") == 2
    with pytest.raises(dp.InvalidInputError, match="made by another recipe"):
        dp.compress(folder, stages[:1], out=tmp_path / "run")
    assert dp.compress(folder, stages[:1], out=tmp_path / "run", update=True).spec.plan.steps != 3


def test_a_recipe_and_stage_objects_give_the_same_checkpoint(
    folder: Path, small: dp.Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "stages:\n- prune: {method: magnitude, ratio: 0.5, round_to: 4}\n- schedule: {solver: ddim, steps: 3}\n"
    )
    recipes: tuple[dp.Recipe | str | Path, ...] = (dp.Recipe.load(file), file, str(file))
    for number, recipe in enumerate(recipes):
        assert dp.compress(folder, recipe, out=tmp_path / str(number)).hash == small.hash


def test_what_does_not_fit_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(dp.InvalidInputError, match="prune cannot come after quantize"):
        dp.compress(folder, [dp.Quantize(), dp.Prune(method="magnitude")], out=tmp_path / "a")
    with pytest.raises(dp.InvalidInputError, match="is not a stage"):
        dp.compress(folder, ["prune"], out=tmp_path / "a")  # type: ignore[list-item]
    with pytest.raises(dp.InvalidInputError, match="the recipe names data, teacher and seed itself"):
        dp.compress(folder, "int8", seed=1, out=tmp_path / "a")
    with pytest.raises(dp.InvalidInputError, match=r"nowhere\.npz does not exist"):
        dp.compress(folder, [dp.Prune()], data="nowhere.npz", out=tmp_path / "a")
    with pytest.raises(dp.InvalidInputError, match="no such checkpoint folder"):
        dp.load(tmp_path / "nothing here")
    with pytest.raises(dp.InvalidInputError, match=r"diffpress\.Prune\.ratio: .*less than 1, found 1\.5"):
        dp.Prune(ratio=1.5)
    with pytest.raises(dp.InvalidInputError, match=r"keep_fragile is now called 'keep_sensitive_layers'"):
        dp.Quantize("int8", keep_fragile=True)
    with pytest.raises(
        dp.InvalidInputError, match=r"unknown key 'diffpress\.Quantize\.samplse'; did you mean 'samples'"
    ):
        dp.Quantize(samplse=2)
    with pytest.raises(dp.InvalidInputError, match=r"Guidance: .*either weight .* or weights"):
        dp.Guidance(weight=2.0, weights=(1.0, 2.0))
    assert not (tmp_path / "a").exists()


def test_the_pipeline_returns_pictures_that_depend_on_seed_and_label_alone(bundle: Path) -> None:
    from PIL import Image

    with dp.Pipeline(bundle, threads=1) as pipe:
        four = pipe(labels=1, seeds=range(4), steps=2)
        alone = pipe(labels=[1], seeds=3, steps=2)
        turned = pipe(seeds=range(3))
    assert all(isinstance(image, Image.Image) and image.size == (8, 8) and image.mode == "L" for image in four)
    assert np.array_equal(np.asarray(four[3]), np.asarray(alone[0])) and len(turned) == 3
    assert not np.array_equal(np.asarray(four[0]), np.asarray(four[1]))


def test_a_callback_sees_every_step_and_changes_no_image(bundle: Path) -> None:
    seen: list[Step] = []
    with dp.Pipeline(str(bundle), threads=1) as pipe:
        plain = pipe(labels=0, seeds=range(3), batch=2)
        watched = pipe(labels=0, seeds=range(3), batch=2, callback=seen.append)
    assert [(step.index, len(step.x)) for step in seen] == [(0, 2), (1, 2), (2, 2), (0, 1), (1, 1), (2, 1)]
    assert seen[0].x0.shape == (2, 1, 8, 8)
    differences = [np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(plain, watched, strict=True)]
    assert max(differences) <= 1  # fused sampling may round one level differently


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a cat"}, r"not conditioned on text; give labels of 0\.\.2"),
        ({"negative_prompt": "a dog"}, "not conditioned on text"),
        ({"labels": 3}, r"labels 3: the model has the classes 0\.\.2"),
        ({"labels": ["shoe"]}, "labels 'shoe': the model has the classes"),
        ({"labels": [0, 1], "seeds": range(3)}, "labels: 2 given for 3 images"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": ["a"]}, "expected integers"),
        ({"seeds": -1}, "seed -1"),
        ({"steps": 0}, "0 steps"),
        ({"solver": "dpm"}, "unknown solver 'dpm'"),
        ({"size": (16, 16)}, "8x8 images only"),
        ({"size": 16}, r"size 16: give height and width"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_requests_that_do_not_fit_the_bundle_are_refused(bundle: Path, arguments: dict[str, Any], message: str) -> None:
    with dp.Pipeline(bundle, threads=1) as pipe, pytest.raises(dp.InvalidInputError, match=message):
        pipe(**arguments)


def test_prompts_make_pictures_of_a_text_model(sd_bundle: Path) -> None:
    with dp.Pipeline(sd_bundle, "onnxruntime", threads=1) as pipe:
        images = pipe("a red cat", negative_prompt="people", seeds=range(2), steps=2, size=(16, 24))
        listed = pipe(["a red cat", "a cat"], steps=2)
        with pytest.raises(dp.InvalidInputError, match="give a prompt"):
            pipe(seeds=0)
        with pytest.raises(dp.InvalidInputError, match="not class-conditional"):
            pipe("a cat", labels=1)
    assert [image.size for image in images] == [(24, 16)] * 2 and images[0].mode == "RGB"
    assert len(listed) == 2 and not np.array_equal(np.asarray(listed[0]), np.asarray(listed[1]))


def test_bench_and_evaluate_return_the_documented_shapes(folder: Path) -> None:
    rows = dp.bench(TINY, [TINY], batch=[1], repeats=1)["rows"]
    assert len(rows) == 2 and {"name", "engine", "precision", "batch", "steps", "step_ms", "image_ms"} <= set(rows[0])
    with pytest.raises(dp.InvalidInputError, match="samples = 4: too few"):
        dp.evaluate(folder, samples=4)
    with pytest.raises(dp.InvalidInputError, match="feature network"):
        dp.evaluate(folder, samples=8)
