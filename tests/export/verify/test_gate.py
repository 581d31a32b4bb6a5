"""export/verify/gate.py: what each kind of graph must reach, and which engines fail the gate."""

from __future__ import annotations

import pytest

from diffpress.export.verify.gate import ParityGate


@pytest.mark.parametrize(
    ("precision", "fake_quant_db", "required_db"),
    [
        ("fp32", None, 60.0),
        ("fp16", None, 40.0),
        ("bf16", None, 22.0),
        ("fp32", 33.4, 32.4),  # a quantized graph may lose `within_db` to fake quantization
        ("fp32", 168.0, 60.0),  # what no rounding explains counts for nothing
        ("fp32", 0.3, 0.0),
        ("fp32", -5.0, 0.0),  # never worse than zeros
        ("bf16", 46.6, 35.5),  # rounding the float layers to bfloat16 costs 37 dB by itself
        ("fp16", 30.0, 29.0),
    ],
)
def test_every_kind_of_graph_has_its_bound(precision: str, fake_quant_db: float | None, required_db: float) -> None:
    assert ParityGate().required_db(precision, fake_quant_db, 1.0) == required_db
    assert ParityGate(sqnr_db=-3.0).required_db(precision, fake_quant_db, 1.0) == -3.0


@pytest.mark.parametrize(
    ("targets", "tested", "targeted"),
    [
        (("onnx",), ("openvino", "onnxruntime"), {"onnxruntime"}),
        (("openvino",), ("openvino", "onnxruntime"), {"openvino"}),
        (("onnx", "openvino"), ("openvino", "onnxruntime"), {"openvino", "onnxruntime"}),
        (("onnx",), ("openvino",), {"openvino"}),  # bfloat16, which ONNX Runtime does not run
        (("tensorrt",), ("openvino", "onnxruntime"), {"openvino", "onnxruntime"}),
    ],
)
def test_the_engines_of_the_targets_fail_the_gate(
    targets: tuple[str, ...], tested: tuple[str, ...], targeted: set[str]
) -> None:
    assert ParityGate(targets).targeted(tested) == targeted


def test_a_quantized_model_that_is_worse_than_zeros_is_told_what_to_do() -> None:
    advice = ParityGate().advice("fp32", -6.9, 2.3)
    assert "further from the float model's than zeros are" in advice and "quantize.ignored_layers" in advice
    assert "--parity-sqnr-db -7 (in a recipe gates.parity_sqnr_db)" in advice
