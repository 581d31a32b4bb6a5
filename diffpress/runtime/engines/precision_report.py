"""Precision report: which layers an engine executed on integers, which in float, and why.

    integer_mac_share   MACs on integers / all MACs
    float_layers        layer -> its float MACs / all MACs, largest first
    fallbacks           layer expected to run on integers that did not -> reason, largest first

A layer is named after its ONNX node, which has the name of the torch layer if diffpress.export.graph.trace knows it;
repeated uses of one layer ('proj', 'proj#2') are summed. Names are stored in manifests, so they must not vary between
runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

CALL = "#"  # precedes the number of a repeated use in a node name
UNMATCHED = "no integer kernel matched"
UNSEEN = "not among the layers that ran"


class Product(NamedTuple):
    """An executed operation with its MACs; `reason` states why it ran in float, if it did."""

    name: str
    macs: int
    integer: bool
    reason: str = UNMATCHED


class Kernel(NamedTuple):
    """An executed kernel: the ONNX nodes (or their output tensors) it covers, and its median time in ms."""

    names: tuple[str, ...]
    ms: float


class PrecisionReport(NamedTuple):
    """Precision of the executed layers; fields are described at the top of this file."""

    integer_mac_share: float
    float_layers: dict[str, float]
    fallbacks: dict[str, str]


def precision_report_of(products: Sequence[Product], quantized_layers: Collection[str] = ()) -> PrecisionReport:
    """Summarize the operations of one run.

    A layer of `quantized_layers` that is in no product also counts as a fallback, since nothing shows that it ran on
    integers. The integer MAC share is 0 if there are no MACs.
    """
    products = [product for product in products if product.macs]
    total = sum(product.macs for product in products) or 1
    seen = {_layer(product) for product in products}
    floats: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for product in products:
        if not product.integer:
            layer = _layer(product)
            floats[layer] = floats.get(layer, 0) + product.macs
            reasons.setdefault(layer, product.reason)
    largest_first = sorted(floats, key=lambda layer: (-floats[layer], layer))
    return PrecisionReport(
        integer_mac_share=sum(product.macs for product in products if product.integer) / total,
        float_layers={layer: floats[layer] / total for layer in largest_first},
        fallbacks={layer: reasons[layer] for layer in largest_first if layer in quantized_layers}
        | dict.fromkeys(sorted(set(quantized_layers) - seen), UNSEEN),
    )


def _layer(product: Product) -> str:
    return product.name.partition(CALL)[0]
