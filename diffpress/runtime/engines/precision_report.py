"""What an engine really executed, told apart by layer: which products ran on integers, which in float, and why.

    integer_mac_share   MACs on integers / all MACs
    float_layers        layer -> its float MACs / all MACs, the largest first
    fallbacks           layer that was promised on integers, but not seen there -> reason, the largest first

A layer has the name of its ONNX node, which is that of the torch layer where diffpress.export.graph.trace knows one; calls of one
layer ('proj', 'proj#2') count together. Names end up in manifests, so none may depend on the run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

CALL = "#"
UNMATCHED = "no integer kernel matched"
UNSEEN = "not among the layers that ran"


class Product(NamedTuple):
    """An operation that was executed, its multiply-accumulates, and why in float where it was (plain words)."""

    name: str
    macs: int
    integer: bool
    reason: str = UNMATCHED


class Kernel(NamedTuple):
    """What an engine executed at once: the ONNX nodes (or tensors they write) it stands for, and its median time."""

    names: tuple[str, ...]
    ms: float


class PrecisionReport(NamedTuple):
    """See the top of this file."""

    integer_mac_share: float
    float_layers: dict[str, float]
    fallbacks: dict[str, str]


def precision_report_of(products: Sequence[Product], promised: Collection[str] = ()) -> PrecisionReport:
    """The account of one run; `promised` are the layers that the manifest lists as quantized.

    A promised layer that is in no product is a fallback too, for nothing shows that it ran on integers. The share is 0
    where there is nothing to multiply.
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
        fallbacks={layer: reasons[layer] for layer in largest_first if layer in promised}
        | dict.fromkeys(sorted(set(promised) - seen), UNSEEN),
    )


def _layer(product: Product) -> str:
    return product.name.partition(CALL)[0]
