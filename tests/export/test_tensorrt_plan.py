import importlib.util

import onnx
import pytest
from onnx import TensorProto, helper

from export.bundle import write_bundle
from export.graph import save_graph
from export.tensorrt_plan import build_plan
from runtime.bundle import sha256
from runtime.errors import BadInput, MissingExtra

needs_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")


def test_without_tensorrt_the_extra_is_named_before_any_work(wide, tmp_path, monkeypatch):
    monkeypatch.setattr("export.tensorrt_plan.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("export.bundle.to_onnx", lambda *_: pytest.fail("traced before the check"))
    with pytest.raises(MissingExtra, match=r"tensorrt-rtx.*pip install 'diffpress\[tensorrt\]'"):
        write_bundle(wide, tmp_path / "b", ["tensorrt"], capabilities=["8.9"])
    assert list(tmp_path.iterdir()) == []


@needs_tensorrt
def test_a_plan_is_built_without_a_gpu(wide, wide_graph, tmp_path):
    save_graph(wide_graph, tmp_path / "g.onnx")
    entry = build_plan(tmp_path / "g.onnx", tmp_path, ["8.6", "12.0"], wide.spec)
    assert entry["file"] == "engines/tensorrt/denoiser_sm86_sm120.plan"
    assert (tmp_path / entry["file"]).stat().st_size > 100_000
    assert entry["graph_sha256"] == sha256(tmp_path / "g.onnx")
    assert entry["compute_capabilities"] == ["8.6", "12.0"] and entry["batch"]["min"] == 1


@needs_tensorrt
@pytest.mark.parametrize(
    ("capabilities", "message"), [([], "name the GPUs"), (["8.7"], "unknown compute capability '8.7': did you mean '8")]
)
def test_capabilities_that_cannot_be_built_for_are_refused(capabilities, message, wide, tmp_path):
    with pytest.raises(BadInput, match=message):
        build_plan(tmp_path / "g.onnx", tmp_path, capabilities, wide.spec)


@needs_tensorrt
def test_a_node_that_tensorrt_does_not_know_is_named_in_one_line(wide, tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    node = helper.make_node("Nonsense", ["x"], ["y"], "the_node", domain="ours")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ours", 1)]
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "g.onnx")
    with pytest.raises(BadInput, match=r"g.onnx: TensorRT cannot parse node 'the_node' \(Nonsense\)") as caught:
        build_plan(tmp_path / "g.onnx", tmp_path, ["8.9"], wide.spec)
    assert "\n" not in str(caught.value)
