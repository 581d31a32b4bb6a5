"""export/targets/triton.py: the model repository, read with Triton's own protobuf, describes the ONNX file in it.

The package tritonclient[grpc] has that protobuf; it is not among the project's dependencies. No server is run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diffpress.compress.config import ExportConfig
from diffpress.export.targets.sampler.target import sampler_content
from diffpress.export.targets.triton import TYPES, model_config
from diffpress.runtime.bundle import Bundle, sha256
from tests.export.targets.sampler.unsealed import SHAPE, nonlinear_graph, unsealed_bundle
from tests.runtime.fused_specs import CLASSES, spec_of

CONFIG = ExportConfig(targets=("triton",), threads=1)


def bundle_in(folder: Path, guidance: float = 2.0, dtype: type = np.float32) -> Bundle:
    spec = replace(spec_of("ddim", "v", conditioning=CLASSES, guidance=guidance), sample_shape=SHAPE)
    return unsealed_bundle(folder, nonlinear_graph(dtype), spec, "fp32" if dtype is np.float32 else "fp16")


def parsed(text: str) -> Any:
    """Return the config as Triton's ModelConfig message; skips without tritonclient."""
    model_config_pb2 = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="needs Triton's protobuf: pip install 'tritonclient[grpc]'"
    )
    from google.protobuf import text_format

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def shape_of(value: onnx.ValueInfoProto) -> list[int]:
    """Return the shape of a graph's input or output, with -1 for a size that is not fixed."""
    return [-1 if size.dim_param else size.dim_value for size in value.type.tensor_type.shape.dim]


def backend_shape(tensor: Any) -> list[int]:
    """Return the shape that Triton passes to the model, or gets from it."""
    return list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_name_type_and_shape_of_the_config_is_that_of_the_onnx(tmp_path: Path, guidance: float) -> None:
    content = sampler_content(bundle_in(tmp_path / "b", guidance), CONFIG)
    model = tmp_path / "b" / content["sampler"]["triton"] / "sampler"
    config, graph = parsed((model / "config.pbtxt").read_text()), onnx.load(model / "1" / "model.onnx").graph
    assert (config.name, config.backend, config.max_batch_size) == (model.name, "onnxruntime", 0)
    for tensors, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        for tensor, value in zip(tensors, values, strict=True):
            assert backend_shape(tensor) == shape_of(value) and len(tensor.dims) >= 1
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
            assert tensor.data_type == _number(TYPES[dtype])
    assert ("guidance" in {tensor.name for tensor in config.input}) == (guidance > 1)


def _number(name: str) -> int:
    from tritonclient.grpc import model_config_pb2

    return int(model_config_pb2.DataType.Value(name))


def test_tokens_and_numbers_have_types_and_shapes_that_triton_accepts() -> None:
    inputs = {
        "input_ids": {"dtype": "int64", "shape": ["batch", 16]},
        "guidance": {"dtype": "float32", "shape": []},
    }
    outputs = {"images": {"dtype": "float32", "shape": ["batch", 8, 8, 3]}}
    config = parsed(model_config({"inputs": inputs, "outputs": outputs}))
    assert [list(tensor.dims) for tensor in config.input] == [[-1, 16], [1]]
    assert config.input[1].HasField("reshape") and not config.input[1].reshape.shape
    assert [tensor.data_type for tensor in config.input] == [_number("TYPE_INT64"), _number("TYPE_FP32")]


def test_the_model_is_the_verified_sampler(tmp_path: Path) -> None:
    content = sampler_content(bundle_in(tmp_path / "b"), CONFIG)
    version = tmp_path / "b" / "triton" / "sampler" / "1"
    assert [file.name for file in version.iterdir()] == ["model.onnx"]
    assert sha256(version / "model.onnx") == sha256(tmp_path / "b" / "sampler.onnx")
    assert content["sampler"]["parity"]["max_abs"] < 1e-3 and "parity_failures" not in content


def test_a_data_file_comes_along_under_the_name_that_the_graph_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.export.graph.model.MAX_INLINE_BYTES", 100)
    monkeypatch.setattr("diffpress.export.graph.model.SMALL_BYTES", 64)
    sampler_content(bundle_in(tmp_path / "b"), CONFIG)
    version = tmp_path / "b" / "triton" / "sampler" / "1"
    assert {file.name for file in version.iterdir()} == {"model.onnx", "sampler.onnx.data"}
    onnx.checker.check_model(str(version / "model.onnx"))


def test_target_sampler_alone_writes_no_repository(tmp_path: Path) -> None:
    content = sampler_content(bundle_in(tmp_path / "b"), ExportConfig(targets=("sampler",), threads=1))
    assert not (tmp_path / "b" / "triton").exists() and "triton" not in content["sampler"]
