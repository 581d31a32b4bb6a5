"""export/lowering.py: every pass keeps the graph valid, its inputs and outputs, and its numbers within a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.export.graph.model import Graph, check_graph
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.lowering import INSERT_QDQ, LOWERING, Pass, PassContext, lower, run_pass
from diffpress.export.verify.gate import FLOAT_SQNR_DB
from diffpress.export.verify.reference import WITHIN_DB
from diffpress.runtime.errors import InvalidInputError
from tests.export.oracle import inputs_for, run_exactly, with_recorded_reads
from tests.export.passes.test_formats import ON_CPU, calibrated

HALVES = ["fp16", "bf16"]
TARGETS = {"cpu": "insert_qdq", "tensorrt": "insert_qdq_tensorrt"}


@pytest.fixture(scope="module")
def rewritten(unet: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The U-Net quantized with everything that rewrites its float graph: low-rank branches and smoothing."""
    methods: dict[str, Any] = {"svdquant": {"rank": 4}, "smoothquant": {"alpha": 0.5}, "split_concats": True}
    config = QuantizeConfig(format="w4a8", samples=4, batch=4, output_correction=False, **methods)
    return quantize(unet, config, Context(0, tmp_path_factory.mktemp("work"), unet))


def checked(
    checkpoint: Checkpoint, graph: Graph, target: str, context: PassContext, inputs: dict[str, np.ndarray]
) -> list[str]:
    """Run the passes of a target one by one and check each; return the names of those that changed the graph."""
    changed: list[str] = []
    exact = run_exactly(graph, inputs)
    for step in LOWERING[target]:
        after = run_pass(step, graph, context)
        if after is graph:
            continue
        changed.append(step.name)
        check_graph(after)
        for values in ("input", "output"):
            assert getattr(after.proto.graph, values) == getattr(graph.proto.graph, values)
        before, found = (run_exactly(runnable(one), inputs) for one in (graph, after))
        if step.bound is not None:
            assert np.abs(found - before).max() <= step.bound * np.abs(before).max(), step.name
        elif context.quantization is None:
            assert sqnr_db(exact, found) > FLOAT_SQNR_DB[context.precision]
        else:
            rounded = TorchNetwork(fake_quantized(checkpoint), checkpoint.spec).run(inputs)
            assert abs(sqnr_db(exact, found) - sqnr_db(exact, rounded)) < WITHIN_DB
            assert step.name == "to_half" or sqnr_db(rounded, found) > sqnr_db(exact, rounded) + 1
        graph = after
    return changed


def runnable(graph: Graph) -> Graph:
    """Return the graph in types that ONNX Runtime can execute."""
    types = {tensor.data_type for tensor in graph.proto.graph.initializer}
    return lower(graph, "check", PassContext()) if onnx.TensorProto.BFLOAT16 in types else graph


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ON_CPU)
@pytest.mark.parametrize("model", ["unet", "everything", "wide"])
def test_every_pass_of_a_quantized_model_stays_within_its_bound(
    model: str, kind: str, target: str, request: pytest.FixtureRequest
) -> None:
    checkpoint, graph = request.getfixturevalue(model), request.getfixturevalue(f"{model}_graph")
    checkpoint = checkpoint.evolve(quantization=calibrated(checkpoint, kind))
    changed = checked(checkpoint, graph, target, PassContext(checkpoint.quantization), inputs_for(checkpoint))
    expected = ["linear_to_conv1x1"] if target == "cpu" else []
    expected += [] if kind == "int8" else ["min_opset"]
    assert changed == [*expected, TARGETS[target]]


@pytest.mark.parametrize(("target", "precision"), [("cpu", "fp32"), ("tensorrt", "fp16"), ("tensorrt", "bf16")])
def test_every_pass_of_a_smoothed_model_with_branches_stays_within_its_bound(
    target: str, precision: str, rewritten: Checkpoint, unet_graph: Graph
) -> None:
    context = PassContext(rewritten.quantization, precision)
    changed = checked(rewritten, unet_graph, target, context, inputs_for(rewritten))
    expected = ["svdquant", "smoothquant", *(["linear_to_conv1x1"] if target == "cpu" else []), "min_opset"]
    assert changed == [*expected, TARGETS[target], *([] if precision == "fp32" else ["to_half"])]


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("model", ["unet", "everything", "wide"])
def test_a_float_model_is_only_rounded_to_half_precision(
    model: str, precision: str, request: pytest.FixtureRequest
) -> None:
    checkpoint, graph = request.getfixturevalue(model), request.getfixturevalue(f"{model}_graph")
    for target in TARGETS:
        context = PassContext(precision=precision)
        assert checked(checkpoint, graph, target, context, inputs_for(checkpoint)) == ["to_half"]
        assert lower(graph, target, PassContext()) is graph


def test_folding_keeps_the_numbers_at_the_timesteps_of_the_plan(plain: Checkpoint) -> None:
    graph, timesteps = to_onnx(plain.model, plain.spec), plain.spec.plan.timesteps
    inputs = inputs_for(plain, batch=len(timesteps)) | {"timestep": np.array(timesteps, np.int64)}
    assert checked(plain, graph, "float", PassContext(timesteps=timesteps), inputs) == ["fold_timesteps"]
    assert lower(graph, "float", PassContext()) is graph


def test_lowering_reads_no_weight_before_the_graph_is_written(rewritten: Checkpoint, unet_graph: Graph) -> None:
    for target in TARGETS:
        reads: list[str] = []
        lower(with_recorded_reads(unet_graph, reads), target, PassContext(rewritten.quantization))
        assert reads == []


# --- failing passes --------------------------------------------------------------------------------------------


def damaging(change: Callable[[onnx.GraphProto], None]) -> Pass:
    """Return a pass that applies `change` to a copy of the graph."""

    def run(graph: Graph, context: PassContext) -> Graph:
        proto = onnx.ModelProto()
        proto.CopyFrom(graph.proto)
        change(proto.graph)
        return Graph(proto, graph.weights)

    return Pass("damage", run, lambda graph, context: "")


def test_a_pass_that_breaks_an_invariant_is_named(unet_graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(graph: onnx.GraphProto) -> None:
        graph.node[0].input[0] = "nowhere"

    def forget(graph: onnx.GraphProto) -> None:
        graph.output[0].type.tensor_type.shape.dim[0].dim_param = "another"

    for change, message in (
        (rename, "returned an invalid graph: .*nowhere"),
        (forget, "changed the inputs or outputs"),
    ):
        monkeypatch.setitem(LOWERING, "cpu", (damaging(change),))
        with pytest.raises(RuntimeError, match=f"^pass 'damage' {message}"):
            lower(unet_graph, "cpu", PassContext())


def test_a_pass_that_rejects_the_scales_is_named_in_a_note(unet: Checkpoint, unet_graph: Graph) -> None:
    quantization = calibrated(unet, "int8")
    amax = {
        key: -value if key == "mid_block.resnets.0.conv1.weight" else value for key, value in quantization.amax.items()
    }
    with pytest.raises(InvalidInputError, match=r"^layer 'mid_block\.resnets\.0\.conv1'") as caught:
        lower(unet_graph, "cpu", PassContext(replace(quantization, amax=amax)))
    assert caught.value.__notes__ == ["in pass 'insert_qdq'"]


@pytest.mark.parametrize("target", TARGETS)
def test_passes_in_another_order_are_refused_by_what_they_require(
    target: str, rewritten: Checkpoint, unet_graph: Graph
) -> None:
    """Each pair of passes whose order the tuples fix by a requirement."""
    context = PassContext(rewritten.quantization, "fp16")
    passes = {step.name: step for step in LOWERING[target]}
    insert = TARGETS[target]
    wrong = [
        (["smoothquant"], "svdquant", "layers that are not smoothed yet"),
        ([], insert, "opset 21"),
        (["min_opset", insert], "smoothquant", "a float32 graph without Q/DQ"),
        (["min_opset", insert], insert, "a float32 graph without Q/DQ"),
        (["to_half"], "svdquant", "a float32 graph without Q/DQ"),
        (["to_half"], "to_half", "a graph that is not in half precision"),
    ]
    for before, name, message in wrong:
        graph = unet_graph
        for step in before:
            graph = run_pass(passes[step], graph, context)
        with pytest.raises(RuntimeError, match=f"^pass '{name}' requires {message}"):
            run_pass(passes[name], graph, context)


def test_a_format_without_a_graph_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="quantization format 'fp4' has no Q/DQ graph"):
        PassContext(Quantization("fp4"))


def test_the_order_of_the_passes_is_fixed() -> None:
    assert {target: [step.name for step in passes] for target, passes in LOWERING.items()} == {
        "float": ["fold_timesteps"],
        "cpu": ["svdquant", "smoothquant", "linear_to_conv1x1", "min_opset", "insert_qdq", "to_half"],
        "tensorrt": ["svdquant", "smoothquant", "min_opset", "insert_qdq_tensorrt", "to_half"],
        "check": ["bf16_to_fp32"],
    }
    assert INSERT_QDQ.bound is None
