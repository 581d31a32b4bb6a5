"""Roofline of a race: the time that the products of one evaluation take at this machine's measured peaks.

    bound = MACs of layers / peak of their type + MACs of q k^T / peak of theirs + MACs of p v / peak of theirs

The peaks are those of diffpress.runtime.benchmarking.peaks in OpenVINO, with all cores. Normalization, softmax,
activations and reading the weights from memory are not in the bound: they are what lies between it and the measured
time.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from made_models import Race, recorded

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
    from diffpress.runtime.benchmarking.peaks import measured_peaks
    from diffpress.runtime.engines.options import EngineOptions

    layers, attention = gmacs(race)
    peaks = measured_peaks("openvino", EngineOptions()).gmacs
    return {"peak_gmacs": peaks, "layer_gmacs": layers, "attention_gmacs": attention}


def bound_ms(roofline: dict[str, Any], subject: str) -> float | None:
    """Return the bound of a subject in ms; None if its types are not known, or this machine does not execute one."""
    if subject not in SUBJECT_TYPES or not set(SUBJECT_TYPES[subject]) <= set(roofline.get("peak_gmacs", ())):
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
