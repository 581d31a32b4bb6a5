"""`diffpress search` and `diffpress recommend` from the command line, on a tiny denoiser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from diffpress.cli.main import main
from diffpress.compress.checkpoint import save_checkpoint
from diffpress.compress.recipe import Recipe
from diffpress.runtime.bundle import load_bundle
from tests.compress.conftest import image_arrays, make_unet


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, images, and two feature networks."""
    made = tmp_path_factory.mktemp("search")
    save_checkpoint(make_unet(classes=4), made / "model")
    x, y = image_arrays()
    np.savez(made / "images.npz", x=x, y=y)
    for seed in (1, 2):
        write_features(made / f"features_{seed}.onnx", seed)
    return made


def write_features(file: Path, seed: int) -> None:
    """A random projection of the 64 pixels to 6 features."""
    weight = np.random.default_rng(seed).standard_normal((64, 6)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["sample"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["features"]),
    ]
    sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", 1, 8, 8])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 6])
    graph = helper.make_graph(nodes, "features", [sample], [features], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, file)


def words(folder: Path, *more: object) -> list[str]:
    images = folder / "images.npz"
    found = ["search", folder / "model", "--data", images, "--engine", "onnxruntime", "--threads", 1, "--samples", 16]
    found += ["--features", folder / "features_1.onnx", "--reference", images]
    found += ["--select-features", folder / "features_2.onnx", "--select-reference", images, "--train-steps", 3]
    return [str(word) for word in (*found, *more)]


@pytest.mark.slow
def test_a_search_exports_its_front_and_names_what_keeps_the_bounds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    assert main(words(folder, "--trials", 2, "--max-latency-ratio", 50, "--out", out, "--json", folder / "f.json")) == 0
    front = json.loads((out / "front.json").read_text())
    assert json.loads((folder / "f.json").read_text()) == front
    assert front["chosen"] in capsys.readouterr().out
    assert front["reporting"]["features"]["sha256"] != front["selecting"]["features"]["sha256"]
    for member in front["front"]:
        Recipe.load(out / member["recipe"])
        load_bundle(out / member["bundle"])
        assert member["latency_ratio"] > 0 and member["frechet_ratio"] > 0
    assert load_bundle(out / "chosen" / "bundle").hash == load_bundle(out / "front" / front["chosen"] / "bundle").hash
    assert (out / "search.png").is_file() and (out / "latencies.json").is_file()

    assert main(words(folder, "--trials", 2, "--max-latency-ratio", 0.001, "--out", out)) == 2
    assert "was made by another search" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_that_finds_nothing_within_the_bounds_keeps_the_work_and_exits_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "none"
    assert main(words(folder, "--trials", 1, "--max-size-mib", 0.001, "--out", out)) == 1
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("diffpress:")]) == 1
    assert "nothing meets the bounds; trial-000 comes nearest: size_mib is" in said[-1]
    assert json.loads((out / "front.json").read_text())["chosen"] is None and not (out / "chosen").exists()


def test_a_recommended_recipe_loads_and_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = folder / "recipe.yaml"
    command = ["recommend", folder / "model", "--engine", "onnxruntime", "--threads", 1]
    assert main([str(word) for word in (*command, "--data", folder / "images.npz", "--out", recipe)]) == 0
    said = capsys.readouterr().out
    assert "MACs:" in said and "most sensitive alone" in said and "relative to fp32" in said
    loaded = Recipe.load(recipe)
    text = recipe.read_text()
    for stage in loaded.stages:
        before = text[: text.index(f"  - {stage.name}:")].splitlines()
        assert before[-1].startswith("  # ")
    assert main(["plan", str(folder / "model"), "--recipe", str(recipe)]) == 0
    assert main(["recommend", str(folder / "model"), "--out", str(recipe)]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--time", "60"), "--time 60: give a number with a unit"),
        (("--trials", "0"), "--trials 0: give at least 1"),
        (("--max-latency-ratio", "-1"), "search.max_latency_ratio"),
        (("--select-features", "nowhere.onnx"), "--select-features nowhere.onnx: does not exist"),
        (("--data", "nowhere.npz"), "--data nowhere.npz: does not exist"),
        (("--engine", "tensorrt"), "invalid choice"),
        (("--samples", "2"), "search.samples"),
        (("--train-steps", "0"), "search.train_steps"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert main(["search", "somewhere", *flags, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_as_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(words(folder, "--trials", 1, "--out", tmp_path)) == 2
    assert "is not a folder of a search" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
