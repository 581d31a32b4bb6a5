"""export/targets/pipeline_folder.py: files that make a bundle a pipeline folder for other tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, CLIPTokenizer

from diffpress.compress.sources.layout import INDEX, read_layout
from diffpress.export.graph.model import Graph
from diffpress.export.graph.trace import trace
from diffpress.export.targets.pipeline_folder import link_graph, write_graph, write_pipeline_files
from diffpress.runtime.engines import load_engine
from tests.pipelines import tiny_pipeline

PROMPTS = ["a photo of a cat", "Red dog! 3", ""]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Path], Path]:
    """Write a pipeline's files into an empty folder."""

    def write(folder: Path) -> Path:
        (tmp_path / "bundle").mkdir()
        write_pipeline_files(read_layout(folder), tmp_path / "bundle")
        return tmp_path / "bundle"

    return write


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- index, scheduler, tokenizers ------------------------------------------------------------------------------


def test_the_index_names_no_component_that_is_not_in_the_bundle(
    tiny_folder: Callable[..., Path], written: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("sd"), tmp_path / "sd")
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    edit(folder / INDEX, **checker, feature_extractor=["transformers", "CLIPImageProcessor"])
    edit(folder / INDEX, requires_safety_checker=True)
    index, before = (json.loads((root / INDEX).read_text()) for root in (written(folder), folder))
    removed = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    assert index == {**before, **removed}


def test_the_index_of_a_pipeline_without_a_safety_checker_is_unchanged(
    tiny_folder: Callable[..., Path], written: Callable[[Path], Path]
) -> None:
    folder = tiny_folder("sdxl")
    assert json.loads((written(folder) / INDEX).read_text()) == json.loads((folder / INDEX).read_text())


def test_the_scheduler_is_copied_and_weights_are_not(
    tiny_folder: Callable[..., Path], written: Callable[[Path], Path]
) -> None:
    folder, bundle = tiny_folder("sd3"), written(tiny_folder("sd3"))
    config = Path("scheduler") / "scheduler_config.json"
    assert (bundle / config).read_bytes() == (folder / config).read_bytes()
    assert {entry.name for entry in bundle.iterdir()} == {
        INDEX,
        "scheduler",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    }
    assert not list(bundle.rglob("*.safetensors"))


@pytest.mark.parametrize("tokenizer_json", [True, False])
@pytest.mark.parametrize(("kind", "component"), [("sd", "tokenizer"), ("sdxl", "tokenizer_2"), ("flux", "tokenizer_2")])
def test_a_bundles_tokenizer_gives_the_same_ids_as_the_pipelines(
    kind: str, component: str, tokenizer_json: bool, written: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = tiny_pipeline(kind, tmp_path / "from", tokenizer_json=tokenizer_json)
    bundle, own = written(folder), AutoTokenizer.from_pretrained(folder / component)
    alone, again = (
        Tokenizer.from_file(str(bundle / component / "tokenizer.json")),
        AutoTokenizer.from_pretrained(bundle / component),
    )
    for prompt in PROMPTS:
        ids = own(prompt).input_ids
        assert alone.encode(prompt).ids == ids and again(prompt).input_ids == ids
    assert (again.model_max_length, again.pad_token_id) == (own.model_max_length, own.pad_token_id)


def test_a_clip_tokenizer_of_one_file_gets_the_vocabulary_files_of_slow_tokenizers(
    tiny_folder: Callable[..., Path], written: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("sd"), tmp_path / "sd")
    stored = {name: (folder / "tokenizer" / name) for name in ("vocab.json", "merges.txt")}
    ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")(PROMPTS[0]).input_ids
    vocabulary = json.loads(stored["vocab.json"].read_text())
    for file in stored.values():
        file.unlink()
    target = written(folder) / "tokenizer"
    assert json.loads((target / "vocab.json").read_text()) == vocabulary
    (target / "tokenizer.json").unlink()
    assert CLIPTokenizer.from_pretrained(target)(PROMPTS[0]).input_ids == ids


# --- graphs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    examples = {"sample": torch.randn(2, 64)}
    return trace(nn.Linear(64, 64).eval(), lambda m, x: (m(x["sample"]),), examples, ["out"], {"sample": {0: "batch"}})


def output_of(file: Path) -> np.ndarray:
    engine = load_engine(file, "onnxruntime", 1)
    return engine.run({"sample": np.linspace(-1, 1, 64, dtype=np.float32)[None]})


def test_a_graph_and_its_view_share_one_weight_file(graph: Graph, tmp_path: Path) -> None:
    size = write_graph(graph, tmp_path, "denoiser", "unet", {"sample_size": 8})
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"denoiser.onnx", "unet/model.onnx", "unet/model.onnx_data", "unet/config.json"}
    data = tmp_path / "unet" / "model.onnx_data"
    assert data.stat().st_size >= 4 * 64 * 64
    assert size == (tmp_path / "denoiser.onnx").stat().st_size + data.stat().st_size
    for file in ("denoiser.onnx", "unet/model.onnx"):
        assert (tmp_path / file).stat().st_size < 4 * 64 * 64, "the weights are stored twice"
    assert json.loads((tmp_path / "unet" / "config.json").read_text()) == {"sample_size": 8}
    onnx.checker.check_model(str(tmp_path / "unet" / "model.onnx"))
    np.testing.assert_array_equal(output_of(tmp_path / "unet" / "model.onnx"), output_of(tmp_path / "denoiser.onnx"))


def test_a_component_of_another_bundle_is_reused_without_a_second_copy(graph: Graph, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    write_graph(graph, one, "vae_decoder", "vae_decoder", {})
    link_graph(one, other, "vae_decoder")
    for file in ("vae_decoder.onnx", "vae_decoder/model.onnx", "vae_decoder/model.onnx_data"):
        assert (one / file).stat().st_ino == (other / file).stat().st_ino
    expected = output_of(one / "vae_decoder.onnx")
    shutil.rmtree(one)
    np.testing.assert_array_equal(output_of(other / "vae_decoder.onnx"), expected)
