"""Roofline of a race: the time that the products of one evaluation take at this machine's measured peaks.

    bound = MACs of layers / peak of their type + MACs of q k^T / peak of theirs + MACs of p v / peak of theirs

A peak is that of one large convolution or matrix product of a type in OpenVINO, whichever is faster, with all cores.
Its time includes writing the result. Normalization, softmax, activations and reading the weights from memory are not
in the bound: they are what lies between it and the measured time.
"""

from __future__ import annotations

import json
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from made_models import Race, recorded

SIDE, CHANNELS = 64, 512  # of the convolution, 3 x 3
ROWS, DEPTH = 2048, 4096  # of the matrix product, ROWS x DEPTH by DEPTH x ROWS
REPEATS = 7
AROUND = {"fp32": "fp32", "bf16": "bf16", "int8": "fp32"}  # type -> precision of the rest of its model

# subject -> types of its layers, and of attention's q k^T and p v
SUBJECT_TYPES = {
    "openvino-fp32": ("fp32", "fp32", "fp32"),
    "openvino-bf16": ("bf16", "bf16", "bf16"),
    "openvino-bf16-diffpress": ("bf16", "bf16", "bf16"),
    "openvino-int8": ("int8", "int8", "fp32"),
    "openvino-int8-bf16": ("int8", "int8", "bf16"),
    "nncf": ("int8", "int8", "fp32"),
    "nncf-bf16": ("int8", "int8", "bf16"),
}


def measure(race: Race) -> dict[str, Any]:
    """Return peaks in GMAC/s by type, and the GMACs of one evaluation in layers and in products of attention."""
    layers, attention = gmacs(race)
    return {"peak_gmacs": {kind: peak(kind) for kind in AROUND}, "layer_gmacs": layers, "attention_gmacs": attention}


def bound_ms(roofline: dict[str, Any], subject: str) -> float | None:
    """Return the bound of a subject in ms; None if its types are not known."""
    if subject not in SUBJECT_TYPES or "peak_gmacs" not in roofline:
        return None
    half = roofline["attention_gmacs"] / 2.0  # q k^T and p v have the same number
    parts = zip((roofline["layer_gmacs"], half, half), SUBJECT_TYPES[subject], strict=True)
    return 1e3 * sum(count / roofline["peak_gmacs"][kind] for count, kind in parts)


def gmacs(race: Race) -> tuple[float, float]:
    """Return the GMACs of the float graph's layers and of its other products, those of attention."""
    import openvino

    from diffpress.runtime.engines.openvino.layers import products

    inputs, _ = recorded(race, "B")[0]
    model = openvino.Core().read_model(race.float_graph)
    model.reshape({name: array.shape for name, array in inputs.items()})
    # only the operations are needed, not what they were compiled to
    not_compiled = SimpleNamespace(get_runtime_model=lambda: SimpleNamespace(get_ops=list))
    layers = set(json.loads(race.layer_names.read_text()))
    found = [0.0, 0.0]
    for product in products(model, not_compiled):
        found[product.name.partition("#")[0] not in layers] += product.macs / 1e9
    return found[0], found[1]


def peak(kind: str) -> float:
    """Return the GMAC/s of the faster of two large products of a type, each the median of REPEATS runs."""
    convolved = SIDE * SIDE * CHANNELS * CHANNELS * 9 / 1e9
    multiplied = ROWS * ROWS * DEPTH / 1e9
    return max(convolved / _seconds(_convolution(kind), kind), multiplied / _seconds(_product(kind), kind))


def _convolution(kind: str) -> Any:
    import openvino
    from openvino import opset13 as op

    x = op.parameter([1, CHANNELS, SIDE, SIDE], np.float32)
    weight = _weight(kind, (CHANNELS, CHANNELS, 3, 3))
    out = op.convolution(_rounded(kind, op.relu(x)), weight, [1, 1], [1, 1], [1, 1], [1, 1])
    return openvino.Model([op.result(op.relu(out))], [x], "convolution")


def _product(kind: str) -> Any:
    import openvino
    from openvino import opset13 as op

    x = op.parameter([ROWS, DEPTH], np.float32)
    out = op.matmul(_rounded(kind, op.relu(x)), _weight(kind, (DEPTH, ROWS)), False, False)
    return openvino.Model([op.result(op.relu(out))], [x], "product")


def _rounded(kind: str, x: Any) -> Any:
    from openvino import opset13 as op

    bounds = (np.float32(bound) for bound in (0.0, 2.55, 0.0, 2.55))
    return op.fake_quantize(x, *bounds, 256) if kind == "int8" else x


def _weight(kind: str, shape: tuple[int, ...]) -> Any:
    from openvino import opset13 as op

    values = np.random.default_rng(0).integers(-64, 65, shape)
    if kind != "int8":
        return op.constant(values.astype(np.float32) * np.float32(0.01))
    return op.multiply(op.convert(op.constant(values.astype(np.int8)), "f32"), op.constant(np.float32(0.01)))


def _seconds(model: Any, kind: str) -> float:
    import openvino

    from diffpress.runtime.engines.openvino.engine import HINTS

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[AROUND[kind]]}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    x = np.random.default_rng(1).standard_normal(tuple(model.input(0).shape)).astype(np.float32)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        request.infer([x], share_inputs=True, share_outputs=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
