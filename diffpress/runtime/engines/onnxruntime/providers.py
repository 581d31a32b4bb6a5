"""ONNX Runtime's execution providers: which to try, in which order, for what was asked and what its package has."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from diffpress.runtime.errors import unknown_name

CPU = "cpu"

# the preferred one first; the last is in every package
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    CPU: "CPUExecutionProvider",
}


def in_order(asked: Sequence[str], there: Collection[str]) -> tuple[list[str], list[str]]:
    """The names to try one after the other, and those that were asked for and are not there.

    `there` are ONNX Runtime's own names of what its package has. Without a wish all of these are tried in the order
    above; the processor is always the last resort. Raises InvalidInputError for a name that no provider has.
    """
    for name in asked:
        if name not in PROVIDERS:
            raise unknown_name("provider", name, PROVIDERS)
    wanted = list(dict.fromkeys(asked or PROVIDERS))
    found = [name for name in wanted if PROVIDERS[name] in there]
    absent = [name for name in wanted if asked and name not in found]
    return [*found, *([] if CPU in found else [CPU])], absent
