"""The ComfyUI nodes, loaded from their folder and executed as ComfyUI does it, without ComfyUI."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import diffpress as dp
from diffpress.runtime.bundle import MANIFEST, seal
from diffpress.runtime.pipeline import Pipeline
from tests.runtime.conftest import temporary_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
Inputs = dict[str, Any]


def load_custom_node(folder: Path) -> ModuleType:
    """Import a folder of nodes as ComfyUI's loader of the same name does, which reads the two mappings afterwards."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for loaded in [loaded for loaded in sys.modules if loaded.startswith(name)]:
            del sys.modules[loaded]
    return module


@pytest.fixture
def nodes(tmp_path: Path) -> dict[str, Any]:
    """The classes of a copy of the folder: nothing beside it is needed."""
    shutil.copytree(FOLDER, tmp_path / "custom_nodes" / "diffpress", ignore=shutil.ignore_patterns("__pycache__"))
    module = load_custom_node(tmp_path / "custom_nodes" / "diffpress")
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    classes: dict[str, Any] = module.NODE_CLASS_MAPPINGS
    return classes


def execute(nodes: dict[str, Any], workflow: dict[str, Any], node: str) -> tuple[Any, ...]:
    """Execute a node of a workflow in the API's format after those that it is linked to, and check its values."""
    cls, inputs = nodes[workflow[node]["class_type"]], dict[str, Any]()
    declared = cls.INPUT_TYPES()["required"]
    assert workflow[node]["inputs"].keys() == declared.keys()
    for name, value in workflow[node]["inputs"].items():
        kind, *options = declared[name]
        if isinstance(value, list):
            source, index = value
            assert nodes[workflow[source]["class_type"]].RETURN_TYPES[index] == kind
            inputs[name] = execute(nodes, workflow, source)[index]
        else:
            inputs[name] = checked(kind, value, options[0])
    if validate := getattr(cls, "VALIDATE_INPUTS", None):
        names = inspect.signature(validate).parameters
        found = validate(**{name: inputs[name] for name in names})
        if found is not True:
            raise ValueError(found)
    if is_changed := getattr(cls, "IS_CHANGED", None):
        assert is_changed(**inputs) == is_changed(**inputs)
    output = getattr(cls(), cls.FUNCTION)(**inputs)
    assert isinstance(output, tuple) and len(output) == len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES)
    return output


def checked(kind: str | list[str], value: Any, options: dict[str, Any]) -> Any:
    """Return the value of a widget as ComfyUI converts it; raises if it is refused."""
    if isinstance(kind, list):
        assert value in kind
        return value
    converted = {"INT": int, "FLOAT": float, "STRING": str}[kind](value)
    assert not options.get("min", -np.inf) > converted if kind != "STRING" else True
    assert not options.get("max", np.inf) < converted if kind != "STRING" else True
    return converted


@pytest.fixture
def sampled(nodes: dict[str, Any], tiny: Path) -> Callable[..., Any]:  # noqa: F811
    """Return the images of the workflow in the folder, with other values of its inputs."""

    def run(bundle: str | Path = tiny, **changed: Any) -> Any:
        workflow = json.loads((FOLDER / "workflow_api.json").read_text(encoding="utf-8"))
        workflow["1"]["inputs"] |= {"bundle": str(bundle), "engine": "onnxruntime", "threads": 1}
        workflow["2"]["inputs"] |= {"prompt": "", **changed}
        assert workflow["3"]["inputs"]["images"] == ["2", 0] and nodes["DiffpressSample"].RETURN_TYPES == ("IMAGE",)
        return execute(nodes, workflow, "2")[0]

    return run


def test_every_node_declares_what_comfyui_reads(nodes: dict[str, Any]) -> None:
    for cls in nodes.values():
        inputs = cls.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"} and cls.CATEGORY == "diffpress"
        parameters = inspect.signature(getattr(cls(), cls.FUNCTION)).parameters
        assert [*inputs["required"]] == [*parameters]
        for kind, *options in inputs["required"].values():
            if isinstance(kind, list):
                assert kind[0] == "auto" and "onnxruntime" in kind
            elif kind in ("INT", "FLOAT", "STRING"):
                assert checked(kind, options[0]["default"], options[0]) == options[0]["default"]
            else:
                assert kind in {name for other in nodes.values() for name in other.RETURN_TYPES}
            assert not options or json.dumps(options[0])  # sent to the browser


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        ({}, {}),
        ({"label": 1}, {"labels": 1}),
        ({"label": 2, "steps": 5, "guidance": 3.0}, {"labels": 2, "steps": 5, "guidance": 3.0}),
        ({"guidance": 0.0}, {"guidance": 0.0}),
    ],
)
def test_the_images_are_those_of_the_pipeline(
    inputs: Inputs,
    arguments: Inputs,
    sampled: Callable[..., Any],
    tiny: Path,  # noqa: F811
) -> None:
    images = sampled(seed=3, batch=2, **inputs)
    assert images.dtype == torch.float32 and tuple(images.shape) == (2, 8, 8, 3)
    assert 0.0 <= float(images.min()) < float(images.max()) <= 1.0
    with Pipeline(tiny, "onnxruntime", threads=1) as pipe:
        expected = [np.asarray(image.convert("RGB")) for image in pipe(seeds=[3, 4], **arguments)]
    saved = np.clip(255.0 * images.numpy(), 0, 255).astype(np.uint8)  # as Save Image does
    np.testing.assert_array_equal(saved, np.stack(expected))


def test_every_pixel_value_survives_save_image(nodes: dict[str, Any]) -> None:
    from PIL import Image

    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    as_floats = nodes["DiffpressSample"].sample.__globals__["as_floats"]
    floats = as_floats(every)
    np.testing.assert_array_equal((255.0 * floats).astype(np.uint8)[..., 0], np.asarray(every))


@pytest.mark.slow
def test_prompts_reach_the_text_encoders(sampled: Callable[..., Any], sd_bundle: Path) -> None:
    images = sampled(sd_bundle, prompt="a red house", negative="blue", guidance=4.0, seed=5, batch=1, steps=2)
    with Pipeline(sd_bundle, "onnxruntime", threads=1) as pipe:
        (expected,) = pipe("a red house", negative_prompt="blue", guidance=4.0, seeds=5, steps=2)
    np.testing.assert_array_equal(np.round(255.0 * images[0].numpy()).astype(np.uint8), np.asarray(expected))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": "a house"}, "prompt: the model is not conditioned on text; give labels of 0..2"),
        ({"negative": "a house"}, "negative_prompt: the model is not conditioned on text"),
        ({"label": 3}, "labels 3: the model has the classes 0..2"),
        ({"seed": 2**63 - 1, "batch": 2}, "must be in 0.."),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(inputs: Inputs, message: str, sampled: Callable[..., Any]) -> None:
    with pytest.raises(dp.InvalidInputError) as caught:
        sampled(**inputs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bundle", ["", "  ", "nowhere"])
def test_a_folder_that_is_no_bundle_is_refused_before_anything_runs(bundle: str, sampled: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="not a bundle; give the folder of one, absolute or in ") as caught:
        sampled(bundle)
    assert "\n" not in str(caught.value)


def test_names_are_found_in_the_models_of_comfyui(
    sampled: Callable[..., Any],
    tiny: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder_paths = ModuleType("folder_paths")
    folder_paths.models_dir = str(tmp_path / "models")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
    shutil.copytree(tiny, tmp_path / "models" / "diffpress" / "demo")
    assert torch.equal(sampled("demo"), sampled(tiny))
    with pytest.raises(ValueError, match="models/diffpress"):
        sampled("other")


def test_an_export_into_the_same_folder_is_loaded_again(
    nodes: dict[str, Any],
    tiny: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "bundle")
    is_changed = nodes["DiffpressLoadBundle"].IS_CHANGED
    before = is_changed(bundle=str(folder), engine="auto", threads=0)
    assert before == is_changed(bundle=f"{folder} ", engine="auto", threads=0)
    manifest = json.loads((folder / MANIFEST).read_text())
    seal(folder, {**{key: value for key, value in manifest.items() if key not in ("files", "hash")}, "name": "other"})
    assert is_changed(bundle=str(folder), engine="auto", threads=0) != before


def test_a_missing_diffpress_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffpress"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffpress", None)
    with pytest.raises(ImportError, match="the diffpress nodes need the package 'diffpress' in ComfyUI's Python"):
        load_custom_node(FOLDER)
