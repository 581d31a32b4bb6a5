"""Files that a graph refers to: found in every place of an ONNX file, and refused unless the manifest lists them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import MANIFEST, load_bundle, manifest_hash, sha256
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.trust.graph_files import external_files

onnx = pytest.importorskip("onnx")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def seal_graph(folder: Path, model: Any, name: str = "denoiser.onnx", weights: bytes = b"") -> None:
    """Write a graph and weights.bin, and a manifest that fits all of them."""
    (folder / name).write_bytes(model.SerializeToString())
    manifest = json.loads((folder / MANIFEST).read_text())
    if weights:
        (folder / "weights.bin").write_bytes(weights)
    for path in [name, *(["weights.bin"] if weights else [])]:
        manifest["files"][path] = {"bytes": (folder / path).stat().st_size, "sha256": sha256(folder / path)}
    manifest["graphs"]["denoiser"]["file"] = name
    manifest["hash"] = manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def external(tensor: Any, location: str) -> Any:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def weight() -> Any:
    return onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")


def model_with_everything() -> Any:
    """A model with external data wherever ONNX allows a tensor."""
    helper = onnx.helper
    node = helper.make_node("Constant", [], ["c"], value=external(weight(), "in_a_node"))
    branch = helper.make_graph([node], "g", [], [], initializer=[external(weight(), "in_a_branch")])
    choice = helper.make_node("If", ["x"], ["y"], then_branch=branch)
    several = helper.make_node("X", [], ["z"])
    attribute = several.attribute.add(name="tensors", type=onnx.AttributeProto.TENSORS)
    attribute.tensors.append(external(weight(), "in_a_list"))
    attribute = several.attribute.add(name="graphs", type=onnx.AttributeProto.GRAPHS)
    attribute.graphs.append(helper.make_graph([], "h", [], [], initializer=[external(weight(), "in_a_list_of_graphs")]))
    graph = helper.make_graph([choice, several], "main", [], [], initializer=[external(weight(), "in_an_initializer")])
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(external(weight(), "in_sparse_values"))
    sparse.indices.CopyFrom(external(weight(), "in_sparse_indices"))
    inner = helper.make_node("Constant", [], ["o"], value=external(weight(), "in_a_function"))
    function = helper.make_function("d", "f", [], ["o"], [inner], [])
    return helper.make_model(graph, functions=[function])


def test_external_data_is_found_wherever_onnx_has_a_tensor(tmp_path: Path) -> None:
    """The oracle is the package onnx itself, which parses the messages."""
    model = model_with_everything()
    onnx.save(model, tmp_path / "model.onnx")
    found = external_files(tmp_path / "model.onnx")
    text = str(model)
    assert len(found) == 8 == text.count('key: "location"')
    assert all(f'value: "{name}"' in text for name in found)


def test_a_file_that_the_manifest_lists_is_allowed(copy: Path) -> None:
    model = onnx.load(copy / "denoiser.onnx")
    external(model.graph.initializer[0], "weights.bin")
    seal_graph(copy, model, weights=bytes(4096))
    assert load_bundle(copy).denoiser == copy / "denoiser.onnx"


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "other", "", "x/../../secret", "weights.bin\0"])
def test_any_other_file_is_refused_when_the_bundle_is_opened(copy: Path, location: str) -> None:
    (copy.parent / "secret").write_bytes(bytes(4096))
    (copy / "other").write_bytes(bytes(4096))
    model = onnx.load(copy / "denoiser.onnx")
    external(model.graph.initializer[0], location)
    seal_graph(copy, model)
    with pytest.raises(InvalidInputError, match="which the manifest does not list"):
        load_bundle(copy)


def test_a_graph_that_loads_machine_code_is_refused(copy: Path) -> None:
    model = onnx.load(copy / "denoiser.onnx")
    model.graph.node.append(onnx.helper.make_node("EPContext", [], ["code"], domain="com.microsoft"))
    seal_graph(copy, model)
    with pytest.raises(InvalidInputError, match="EPContext"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["denoiser.ort", "denoiser.xml", "denoiser"])
def test_a_graph_in_another_format_is_refused(copy: Path, name: str) -> None:
    seal_graph(copy, onnx.load(copy / "denoiser.onnx"), name)
    with pytest.raises(InvalidInputError, match=r"is an \.onnx file"):
        load_bundle(copy)


def test_any_damaged_file_is_read_to_its_end_or_refused_in_one_line(tmp_path: Path) -> None:
    content, refused = model_with_everything().SerializeToString(), 0
    file = tmp_path / "model.onnx"
    for seed in range(300):
        rng = random.Random(seed)
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + rng.randbytes(4) + content[at + rng.randrange(8) :])
        try:
            external_files(file)
        except InvalidInputError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > 100
    file.write_bytes(b"")
    with pytest.raises(InvalidInputError, match="is empty"):
        external_files(file)
