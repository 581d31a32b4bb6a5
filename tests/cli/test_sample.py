"""`diffpress sample`: from the arguments to the image grid on disk, and one-line errors for invalid input."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffpress.cli.console import console
from diffpress.cli.sample import add_arguments
from diffpress.cli.sample import run as sample_command
from diffpress.runtime.bundle import MANIFEST, load_bundle, manifest_hash
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.carried_settings import with_solver
from diffpress.runtime.engines import available, open_engine
from diffpress.runtime.errors import DiffpressError, MissingDependencyError
from diffpress.runtime.io.images import image_grid, to_uint8
from diffpress.runtime.requested_plan import requested_plan
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import OutputCorrection
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import TimestepSpacing


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with console():
        return sample_command(parser.parse_args([str(argument) for argument in arguments]))


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image)


def with_spec(bundle: Path, spec: DenoiserSpec, folder: Path) -> Path:
    """A copy of the bundle with another spec in its manifest."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((bundle / MANIFEST).read_text()) | {"spec": spec.to_json()}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"hash": manifest_hash(manifest)}))
    return folder


def test_the_image_grid_matches_the_python_api(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "grid.png"
    assert run(tiny, "-n", 7, "--seed", 5, "--out", out, "--engine", "onnxruntime", "--batch", 3) == 0
    bundle = load_bundle(tiny)
    images = generate(open_engine(bundle, "onnxruntime"), bundle.spec, range(5, 12))
    assert np.array_equal(pixels(out), image_grid(to_uint8(images))[:, :, 0])
    line = capsys.readouterr().out
    assert re.fullmatch(
        rf"{re.escape(str(out))}: 7 images, 8 steps of dpmpp_2m in onnxruntime, \d+\.\d ms per image\n", line
    )


def test_streams_and_the_cache_do_not_change_the_images(tiny: Path, tmp_path: Path, temporary_cache: Path) -> None:
    if "openvino" not in available():
        pytest.skip("openvino is not installed")
    usual = (tiny, "-n", 7, "--engine", "openvino", "--batch", 2, "--threads", 2)
    run(*usual, "--no-cache", "--out", tmp_path / "0.png")
    assert list(temporary_cache.iterdir()) == []
    run(*usual, "--out", tmp_path / "1.png")
    # the graph's description, and the compiled models for batch sizes 2 and 1
    assert len(list(temporary_cache.iterdir())) == 3
    run(*usual, "--out", tmp_path / "2.png")
    run(*usual, "--streams", 3, "--out", tmp_path / "3.png")
    assert len({pixels(tmp_path / f"{i}.png").tobytes() for i in range(4)}) == 1


def test_the_batch_size_does_not_change_the_images(tiny: Path, tmp_path: Path) -> None:
    for batch in (1, 4, 9):
        run(tiny, "-n", 9, "--batch", batch, "--engine", "onnxruntime", "--out", tmp_path / f"{batch}.png")
    first, *others = [pixels(tmp_path / f"{batch}.png").astype(int) for batch in (1, 4, 9)]
    assert all(np.abs(first - other).max() <= 1 for other in others)


def test_label_sets_the_class_of_all_images(tiny: Path, tmp_path: Path) -> None:
    run(tiny, "-n", 4, "--label", 2, "--out", tmp_path / "grid.png", "--engine", "onnxruntime")
    checker = np.where(np.indices((8, 8)).sum(axis=0) % 2 == 0, 0.7, -0.7)
    corner = pixels(tmp_path / "grid.png")[10:18, 10:18] / 127.5 - 1
    assert np.abs(corner - checker).max() < 0.3


def test_the_bundles_own_size_is_accepted(tiny: Path, tmp_path: Path) -> None:
    for name, arguments in (("plain", ()), ("sized", ("--size", "8x8"))):
        run(tiny, "-n", 2, "--engine", "onnxruntime", "--out", tmp_path / f"{name}.png", *arguments)
    assert (tmp_path / "sized.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_requested_settings_replace_those_of_the_bundles_plan(tiny: Path) -> None:
    spec = load_bundle(tiny).spec
    assert requested_plan(spec, None, None, None, None) == spec.plan
    assert requested_plan(spec, 5, None, None, None).timesteps == (49, 39, 29, 19, 9)
    assert requested_plan(spec, 5, None, "leading", None).timesteps == (40, 30, 20, 10, 0)
    assert requested_plan(spec, None, None, "linspace", None).steps == spec.plan.steps
    swapped = requested_plan(spec, None, "ipndm", None, 3.0)
    assert (swapped.solver, swapped.guidance, swapped.timesteps) == ("ipndm", 3.0, spec.plan.timesteps)


def test_a_new_number_of_steps_uses_the_models_timestep_spacing(tiny: Path) -> None:
    spec = replace(load_bundle(tiny).spec, spacing=TimestepSpacing("leading", offset=1))
    assert requested_plan(spec, 5, None, None, None).timesteps == (41, 33, 25, 17, 9)  # as DPM-Solver's scheduler
    assert requested_plan(spec, 5, "ddim", None, None).timesteps == (41, 31, 21, 11, 1)
    assert requested_plan(spec, 5, None, "trailing", None).timesteps == (49, 39, 29, 19, 9)


def test_the_end_of_the_plan_applies_only_to_its_own_solver(tiny: Path) -> None:
    spec = load_bundle(tiny).spec
    spec = spec.with_plan(replace(spec.plan, end=0.0))
    assert requested_plan(spec, 5, None, None, None).end == 0.0
    assert requested_plan(spec, None, spec.plan.solver, None, None).end == 0.0
    assert requested_plan(spec, None, "ipndm", None, None).end is None


def test_output_corrections_are_kept_for_other_steps_and_another_solver_gets_a_warning(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = load_bundle(tiny).spec
    plan = replace(spec.plan, output_corrections=(OutputCorrection(0.1, (0.2,)),) * 8)
    bundle = with_spec(tiny, spec.with_plan(plan), tmp_path / "corrected")
    made = {}
    for name, folder, arguments in (
        ("plain", tiny, ()),
        ("corrected", bundle, ()),
        ("same plan", bundle, ("--steps", 8, "--solver", plan.solver, "--guidance", 1)),
        ("fewer", bundle, ("--steps", 5)),
        ("plain, fewer", tiny, ("--steps", 5)),
        ("other", bundle, ("--solver", "ipndm")),
        ("plain, other", tiny, ("--solver", "ipndm")),
    ):
        run(folder, "-n", 2, "--engine", "onnxruntime", "--out", tmp_path / f"{name}.png", *arguments)
        made[name] = pixels(tmp_path / f"{name}.png"), capsys.readouterr().err
    assert (made["corrected"][0] != made["plain"][0]).any() and not made["corrected"][1]
    assert (made["corrected"][0] == made["same plan"][0]).all() and not made["same plan"][1]
    assert (made["fewer"][0] != made["plain, fewer"][0]).any() and not made["fewer"][1]
    assert (made["other"][0] == made["plain, other"][0]).all() and not made["plain, other"][1]
    assert made["other"][1].startswith(
        "warning: the bundle's output corrections were measured for 8 steps of dpmpp_2m at guidance 1; they do not fit"
    )
    for change in ((None, "ipndm", None, None), (None, None, None, 2.0)):
        assert not requested_plan(spec.with_plan(plan), *change).output_corrections
    corrected = spec.with_plan(plan)
    assert not with_solver(corrected, "ipndm").output_corrections and with_solver(corrected, plan.solver) == plan


def test_a_distilled_network_keeps_its_solver_and_warns_about_other_steps(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = load_bundle(tiny).spec
    plan = replace(spec.plan, solver="euler")
    bundle = with_spec(tiny, replace(spec, plan=plan, distilled="trajectory"), tmp_path / "distilled")
    for arguments in ((), ("--solver", "euler"), ("--steps", 8)):
        run(bundle, "-n", 1, "--out", tmp_path / "own.png", *arguments)
        assert not capsys.readouterr().err
    for arguments in (("--steps", 3), ("--solver", "ddim"), ("--grid", "karras")):
        run(bundle, "-n", 1, "--out", tmp_path / "other.png", *arguments)
        assert capsys.readouterr().err == (
            "warning: this network was distilled for its own plan, 8 steps of euler; other plans may reduce the image "
            "quality\n"
        )
    with pytest.raises(DiffpressError, match=r"distilled \(trajectory\) for its own plan, 8 steps of euler") as caught:
        run(bundle, "--solver", "dpmpp_2m", "--out", tmp_path / "refused.png")
    assert caught.value.exit_code == 2 and not (tmp_path / "refused.png").exists()


def test_a_distilled_network_accepts_the_other_plans_it_was_trained_for(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = load_bundle(tiny).spec
    spec_of_student = replace(
        spec,
        plan=replace(spec.plan, solver="euler"),
        distilled="trajectory",
        distilled_timesteps=((45.0,), (47.0, 20.0)),
    )
    for count, timesteps in ((1, (45.0,)), (2, (47.0, 20.0)), (8, spec.plan.timesteps)):
        assert requested_plan(spec_of_student, count, None, None, None) == spec_of_student.plan.over(timesteps)
    assert requested_plan(spec_of_student, 2, None, "trailing", None).timesteps != (47.0, 20.0)
    bundle = with_spec(tiny, spec_of_student, tmp_path / "distilled")
    assert load_bundle(bundle).spec == spec_of_student
    run(bundle, "-n", 1, "--steps", 2, "--out", tmp_path / "trained.png")
    assert not capsys.readouterr().err
    for arguments in (("--steps", 3), ("--steps", 2, "--solver", "ddim")):
        run(bundle, "-n", 1, "--out", tmp_path / "other.png", *arguments)
        assert "for its own plan, 8 steps of euler (or 1 or 2); other plans" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", 5], ["--grid", "karras"], ["--steps", 7, "--solver", "plms"]])
def test_a_bundle_with_fixed_timesteps_refuses_others_with_a_one_line_error(
    tiny: Path, tmp_path: Path, arguments: Sequence[object]
) -> None:
    spec = load_bundle(tiny).spec
    bundle = with_spec(tiny, replace(spec, fixed_timesteps=spec.plan.timesteps), tmp_path / "fixed")
    assert run(bundle, "-n", 1, "--solver", "plms", "--out", tmp_path / "grid.png") == 0  # the same timesteps
    with pytest.raises(DiffpressError, match="is not one of the 8 that this network was exported for") as caught:
        run(bundle, "--out", tmp_path / "other.png", *arguments)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2 and not (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "dpmpp2m"], "unknown solver 'dpmpp2m': did you mean 'dpmpp_2m'?"),
        (["--grid", "karas"], "did you mean 'karras'?"),
        (["--engine", "openvin"], "did you mean 'openvino'?"),
        (["--steps", 51], "51 steps: the model has 50 timesteps"),
        (["--steps", 0], "0 steps"),
        (["--label", 3], "--label 3: the model has the classes 0..2"),
        (["--label", -1], "--label -1"),
        (["--prompt", "a cat"], "--prompt: the model is not conditioned on text; use --label 0..2"),
        (["--negative", "a cat"], "--negative: the model is not conditioned on text; use --label 0..2"),
        (["--size", "16"], "--size 16: give height and width in pixels, as in 512x768"),
        (["--size", "16 x 16"], "--size 16 x 16: give height and width"),
        (["--size", "16x16"], "size 16x16: this bundle's graph makes 8x8 images only"),
        (["-n", 0], "at least 1"),
        (["--batch", 0], "at least 1"),
        (["--threads", 0], "0 threads"),
        (["--seed", -1], "--seed -1"),
        (["--seed", 2**63], "--seed"),
        (["--guidance", "nan"], "guidance nan must be finite"),
    ],
)
def test_invalid_arguments_give_a_one_line_error_and_no_file(
    tiny: Path, tmp_path: Path, arguments: Sequence[object], message: str
) -> None:
    with pytest.raises(DiffpressError) as caught:
        run(tiny, "--out", tmp_path / "grid.png", *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "grid.png").exists()


def test_a_missing_bundle_and_a_missing_extra_are_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DiffpressError, match="not a bundle"):
        run(tmp_path / "nowhere")
    from diffpress.runtime.engines import ENGINES

    monkeypatch.setattr(ENGINES["openvino"], "missing", lambda: "openvino")
    with pytest.raises(MissingDependencyError, match="pip install 'diffpress"):
        run(tiny, "--engine", "openvino")


def test_label_and_prompt_exclude_each_other(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tiny, "--label", 1, "--prompt", "a cat")
    assert "not allowed with" in capsys.readouterr().err


# --- outputs -----------------------------------------------------------------------------------------------------


def images_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: pixels(path) for path in sorted(folder.iterdir())}


def test_a_folder_gets_the_images_of_the_grid_one_by_one_with_their_records(tiny: Path, tmp_path: Path) -> None:
    from PIL import Image

    run(tiny, "-n", 5, "--seed", 40, "--engine", "onnxruntime", "--batch", 2, "--out", f"{tmp_path}/new/")
    bundle = load_bundle(tiny)
    expected = to_uint8(generate(open_engine(bundle, "onnxruntime"), bundle.spec, range(40, 45)))
    found = images_in(tmp_path / "new")
    assert list(found) == [f"0000{seed}.png" for seed in range(40, 45)]
    assert all(np.array_equal(a, b[:, :, 0]) for a, b in zip(found.values(), expected, strict=True))
    with Image.open(tmp_path / "new" / "000044.png") as image:
        record = {key: image.info[key] for key in ("seed", "label", "solver", "steps", "guidance", "size", "bundle")}
    assert record == {
        "seed": "44",
        "label": "1",  # the fifth of three classes in turn
        "solver": "dpmpp_2m",
        "steps": "8",
        "guidance": "1",
        "size": "8x8",
        "bundle": bundle.hash,
    }


def test_arrays_hold_the_samples_of_the_python_api(tiny: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny)
    expected = generate(open_engine(bundle, "onnxruntime"), bundle.spec, range(5))
    for name in ("x.npy", "x.npz"):
        run(tiny, "-n", 5, "--engine", "onnxruntime", "--batch", 2, "--out", tmp_path / name)
    assert np.abs(np.load(tmp_path / "x.npy") - expected).max() < 1e-5
    assert np.array_equal(np.load(tmp_path / "x.npz")["samples"], np.load(tmp_path / "x.npy"))


def test_an_interrupted_folder_keeps_its_images_and_the_same_command_makes_the_rest(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpress.runtime.pipeline import Pipeline

    words = (tiny, "-n", 7, "--engine", "onnxruntime", "--batch", 2)
    run(*words, "--out", f"{tmp_path}/whole/")
    complete, calls = Pipeline.images, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "images", interrupted)
    with pytest.raises(KeyboardInterrupt, match="4 of 7 images are kept; run the same command again for the rest"):
        run(*words, "--out", f"{tmp_path}/part/")
    assert len(images_in(tmp_path / "part")) == 4
    capsys.readouterr()
    run(*words, "--out", f"{tmp_path}/part/")
    assert "part/: 3 images, 8 steps" in (line := capsys.readouterr().out) and line.endswith("; 4 finished before\n")
    whole, part = images_in(tmp_path / "whole"), images_in(tmp_path / "part")
    assert list(whole) == list(part) and all(np.array_equal(whole[name], part[name]) for name in whole)
    run(*words, "--out", tmp_path / "part")  # it is a folder without the slash as well
    assert capsys.readouterr().out == f"{tmp_path}/part: nothing to do, 7 images finished before\n"
    calls.clear()
    with pytest.raises(KeyboardInterrupt, match="nothing was written; with --out DIR/ every finished image is kept"):
        run(*words, "--out", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_a_folder_of_other_images_is_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    run(tiny, "-n", 2, "--out", f"{tmp_path}/x/")
    before = {path: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    with pytest.raises(DiffpressError, match=r"000000.png: was made with other settings \(steps: 8 there, 4 here\)"):
        run(tiny, "-n", 3, "--steps", 4, "--out", f"{tmp_path}/x/")
    assert {path: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.tiff"], "unknown kind of file"),
        (["-n", 10**6, "--out", "x.png"], "too large; give a folder"),
        (["-n", 10**8, "--out", "x.npy"], "are more than 10000000"),
        (["--prompt-file", "p.txt"], "--prompt-file: the model is not conditioned on text; use --label 0..2"),
        (["--conditioning", "c.npz"], "--conditioning: the model is not conditioned on tensors; use --label 0..2"),
        (["--precision", "fp8"], "unknown precision 'fp8': choose from fp32, bf16, fp16"),
    ],
)
def test_other_invalid_arguments_give_a_one_line_error_and_no_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiffpressError) as caught:
        run(tiny, *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_former_names_of_precisions_work_with_a_warning(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for precision, warning in (("fp32", ""), ("f32", "warning: precision f32 is now fp32; the old name works until")):
        run(tiny, "-n", 1, "--precision", precision, "--out", tmp_path / f"{precision}.png")
        assert capsys.readouterr().err.startswith(warning)
    assert (pixels(tmp_path / "f32.png") == pixels(tmp_path / "fp32.png")).all()


def test_the_folder_of_a_compress_run_stands_for_its_bundle(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "work" / "bundle")
    (tmp_path / "work" / "recipe.json").write_text("{}")
    for name, bundle in (("run", tmp_path / "work"), ("bundle", tiny)):
        run(bundle, "-n", 2, "--out", tmp_path / f"{name}.png")
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "bundle.png").read_bytes()


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def text_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text model with engines known in closed form (tests/runtime/test_pipeline.py), in place of any bundle."""
    from tests.runtime.test_pipeline import TEXT, FakeEngines, Letters, make_bundle, make_spec, replace_engines

    fake = make_bundle(make_spec(TEXT))
    fake = replace(fake, manifest=fake.manifest | {"hash": "0123"})
    monkeypatch.setattr("diffpress.runtime.bundle.load_bundle", lambda path, public_key: fake)
    replace_engines(monkeypatch, FakeEngines().open)
    monkeypatch.setattr("diffpress.runtime.text_encoders.open_tokenizer", Letters)
    monkeypatch.setattr("diffpress.runtime.engines.engine_label", lambda engine: "fake")
    monkeypatch.setattr("diffpress.runtime.sample_run.engine_label", lambda engine: "fake")


def prompts_of(folder: Path) -> dict[str, str]:
    from PIL import Image

    found = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            found[path.name] = image.info["prompt"]
    return found


@pytest.mark.usefixtures("text_bundle")
def test_a_prompt_makes_one_image_and_a_prompt_file_one_for_each_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("ab\n\ncd\nab\n")
    run("there", "--prompt", "ab", "--out", f"{tmp_path}/one/")
    assert prompts_of(tmp_path / "one") == {"000000.png": "ab"}
    run("there", "--prompt-file", tmp_path / "p.txt", "--seed", 5, "--out", f"{tmp_path}/file/")
    assert prompts_of(tmp_path / "file") == {"000005.png": "ab", "000006.png": "cd", "000007.png": "ab"}
    run("there", "--prompt-file", tmp_path / "p.txt", "-n", 2, "--batch", 3, "--out", f"{tmp_path}/two/")
    assert list(prompts_of(tmp_path / "two").values()) == ["ab", "ab", "cd", "cd", "ab", "ab"]
    assert [line.partition(", ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{tmp_path}/one/: 1 image",
        f"{tmp_path}/file/: 3 images of 3 prompts",
        f"{tmp_path}/two/: 6 images of 3 prompts",
    ]


@pytest.mark.usefixtures("text_bundle")
def test_a_text_model_needs_a_prompt_and_takes_no_label(tmp_path: Path) -> None:
    for arguments, message in (
        ((), "the model is conditioned on text: give a prompt with --prompt TEXT"),
        (("--negative", "ab"), "the model is conditioned on text: give a prompt"),
        (("--label", 1), "--label: the model is not class-conditional; give a prompt with --prompt TEXT"),
        (("--prompt-file", tmp_path / "nowhere.txt"), "nowhere.txt: not readable"),
    ):
        with pytest.raises(DiffpressError, match=message):
            run("there", *arguments, "--out", tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("text_bundle")
def test_many_long_prompts_give_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("\n".join(["abcdef", "bcdefa", "ab", "cdefab"]))
    run("there", "--prompt-file", tmp_path / "p.txt", "--out", f"{tmp_path}/x/")
    assert capsys.readouterr().err.count("too long for") == 1


def test_the_step_cache_is_followed_and_can_be_switched_off(tiny: Path, tmp_path: Path) -> None:
    spec = load_bundle(tiny).spec
    cache = StepCache("forecast", ("full", "forecast") * 4)
    cached = with_spec(tiny, spec.with_plan(replace(spec.plan, cache=cache)), tmp_path / "cached")
    usual = ("-n", 3, "--engine", "onnxruntime", "--out")
    for bundle, flags, name in ((tiny, (), "own"), (cached, (), "cached"), (cached, ("--no-step-cache",), "off")):
        assert run(bundle, *usual, tmp_path / f"{name}.npy", *flags) == 0
    own, found, off = (np.load(tmp_path / f"{name}.npy") for name in ("own", "cached", "off"))
    assert np.array_equal(own, off) and np.abs(own - found).max() > 1e-3


def test_finished_images_of_another_step_cache_are_not_taken_for_those_of_this_run(tiny: Path, tmp_path: Path) -> None:
    spec = load_bundle(tiny).spec
    cached = spec.with_plan(replace(spec.plan, cache=StepCache("forecast", ("full", "forecast") * 4)))
    bundle, out = with_spec(tiny, cached, tmp_path / "cached"), f"{tmp_path / 'images'}/"
    run(bundle, "-n", 2, "--engine", "onnxruntime", "--out", out)
    with pytest.raises(DiffpressError, match="step_cache"):
        run(bundle, "-n", 2, "--engine", "onnxruntime", "--out", out, "--no-step-cache")
