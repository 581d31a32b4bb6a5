"""export/graph/to_onnx.py: the float graph computes the same as torch, with stable names and bytes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.models.adapter import dummy_inputs
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.runtime.engines import load_engine
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import generate

ROOT = Path(__file__).parents[3]
EXPORT = (
    "import sys; from pathlib import Path; from diffpress.compress.sources.load import load_checkpoint; "
    "from diffpress.export.graph.model import save_graph; from diffpress.export.graph.to_onnx import to_onnx; "
    "checkpoint = load_checkpoint(sys.argv[1]); "
    "save_graph(to_onnx(checkpoint.model, checkpoint.spec), Path(sys.argv[2]))"
)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", ["unet", "everything", "wide"])
def test_onnxruntime_follows_the_same_trajectory_as_torch(
    model: str, batch: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint, graph = request.getfixturevalue(model), request.getfixturevalue(f"{model}_graph")
    save_graph(graph, tmp_path / "g.onnx")
    engine, spec = load_engine(tmp_path / "g.onnx", "onnxruntime", threads=1), checkpoint.spec
    expected = generate(TorchNetwork(checkpoint.model, spec), spec, seeds=range(3), batch=batch)
    assert np.abs(generate(engine, spec, seeds=range(3), batch=batch) - expected).max() <= 1e-3


def test_inputs_and_outputs_have_the_names_and_types_of_diffusers(unet_graph: Graph, wide_graph: Graph) -> None:
    types = {value.name: value.type.tensor_type for value in unet_graph.proto.graph.input}
    assert list(types) == ["sample", "timestep", "class_labels"]
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    assert [t.elem_type for t in types.values()] == [float32, int64, int64]
    assert [d.dim_param or d.dim_value for d in types["sample"].shape.dim] == ["batch", 1, 8, 8]
    assert [value.name for value in unet_graph.proto.graph.output] == ["out_sample"]
    flow = {value.name: value.type.tensor_type.elem_type for value in wide_graph.proto.graph.input}
    assert flow == {"sample": float32, "timestep": float32}


def test_another_process_writes_the_same_bytes(unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    save_checkpoint(unet, tmp_path / "checkpoint")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EXPORT, str(tmp_path / "checkpoint"), str(tmp_path / "there.onnx")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # the exporter's messages are suppressed
    save_graph(unet_graph, tmp_path / "here.onnx")
    assert (tmp_path / "there.onnx").read_bytes() == (tmp_path / "here.onnx").read_bytes()


def test_the_file_contains_weights_and_little_else(unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    save_graph(unet_graph, tmp_path / "g.onnx")
    content = (tmp_path / "g.onnx").read_bytes()
    for path in (str(ROOT), "site-packages", ".py", "pkg.torch"):
        assert path.encode() not in content
    assert len(content) < 4 * sum(p.numel() for p in unet.model.parameters()) + 100_000
    assert not unet_graph.proto.graph.value_info


def test_every_layer_is_found_by_its_name_and_weights_keep_their_names(
    everything: Checkpoint, everything_graph: Graph
) -> None:
    named = {node.name: node.op_type for node in everything_graph.proto.graph.node}
    expected = {
        **dict.fromkeys(["first", "twin_a", "twin_b", "down", "line", "last"], "Conv"),
        **dict.fromkeys(["matmul", "unbiased", "twice", "twice#2"], "MatMul"),
        **{"up": "ConvTranspose", "embedding": "Gather", "gemm": "Gemm"},
    }
    assert {name: named.get(name) for name in expected} == expected
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in load_all(everything_graph).graph.initializer}
    np.testing.assert_array_equal(weights["first.weight"], everything.model.get_parameter("first.weight").detach())
    np.testing.assert_array_equal(weights["matmul.weight"], everything.model.get_parameter("matmul.weight").detach().T)


def test_exporting_does_not_change_the_model_or_the_logging(wide: Checkpoint) -> None:
    wide.model.train()
    before = {name: value.clone() for name, value in wide.model.state_dict().items()}
    to_onnx(wide.model, wide.spec)
    assert wide.model.training and logging.root.manager.disable == 0
    assert all(torch.equal(value, before[name]) for name, value in wide.model.state_dict().items())
    wide.model.eval()


def test_weights_that_exceed_one_file_go_to_a_data_file(
    wide: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("diffpress.export.graph.model.MAX_INLINE_BYTES", 1000)
    graph = to_onnx(wide.model, wide.spec)
    save_graph(graph, tmp_path / "g.onnx")
    assert (tmp_path / "g.onnx").stat().st_size < 20_000 < (tmp_path / "g.onnx.data").stat().st_size
    inputs = {name: value.numpy() for name, value in dummy_inputs(wide.spec, 2).items()}
    expected = TorchNetwork(wide.model, wide.spec).run(inputs)
    np.testing.assert_allclose(load_engine(tmp_path / "g.onnx", "onnxruntime", 1).run(inputs), expected, atol=1e-4)
    # the graph in memory is still complete
    session = onnxruntime.InferenceSession(load_all(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, inputs)[0], expected, atol=1e-4)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.layer(sample) if sample.sum() > 0 else sample


def test_a_module_that_cannot_be_traced_is_named_in_one_line(wide: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match="Branching: cannot be traced") as caught:
        to_onnx(Branching(), wide.spec)
    assert "\n" not in str(caught.value)
