"""Check the range of a float16 graph: largest = max |x| over every float16 tensor, while sampling.

Engines on the CPU do not reveal an overflow: they compute in float32, and ONNX Runtime removes Casts between such
nodes. A second file beside the graph, over the same weights, outputs one additional number per tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference

from diffpress.runtime.engines import Engine
from diffpress.runtime.errors import GateFailedError

LARGEST = "largest_in_float16"
LIMIT = float(np.finfo(np.float16).max)


def write_probed(graph: Path, probed: Path) -> list[str]:
    """Write `graph` to `probed`, in the same folder, with the additional output LARGEST, float32 [n].

    Returns:
        The names of the n nodes that the entries of LARGEST belong to.
    """
    proto = onnx.load(graph, load_external_data=False)
    inferred = shape_inference.infer_shapes(proto).graph
    halves = {v.name for v in inferred.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    names, ends = [], []
    for node in list(proto.graph.node):
        for tensor in halves.intersection(node.output):
            wide, size, end = (f"{LARGEST}/{tensor}/{step}" for step in ("Cast", "Abs", "ReduceMax"))
            proto.graph.node.extend(
                [
                    helper.make_node("Cast", [tensor], [wide], wide, to=TensorProto.FLOAT),
                    helper.make_node("Abs", [wide], [size], size),
                    helper.make_node("ReduceMax", [size], [end], end, keepdims=0),
                    helper.make_node("Unsqueeze", [end, f"{LARGEST}/axis"], [f"{end}/1"], f"{end}/1"),
                ]
            )
            names.append(node.name)
            ends.append(f"{end}/1")
    proto.graph.initializer.append(helper.make_tensor(f"{LARGEST}/axis", TensorProto.INT64, [1], [0]))
    proto.graph.node.append(helper.make_node("Concat", ends, [LARGEST], LARGEST, axis=0))
    proto.graph.output.append(helper.make_tensor_value_info(LARGEST, TensorProto.FLOAT, [len(ends)]))
    probed.write_bytes(proto.SerializeToString())
    return names


class Probed:
    """Engine that runs a probed graph and records the largest output of each node."""

    def __init__(self, engine: Engine, nodes: list[str]) -> None:
        self._engine, self._nodes = engine, nodes
        self._largest = np.zeros(len(nodes), np.float32)

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """The engine's inputs."""
        return self._engine.inputs

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the first output of one evaluation."""
        return next(iter(self.run_all(inputs).values()))

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return all outputs of one evaluation except LARGEST, which is recorded."""
        outputs = self._engine.run_all(inputs)
        self._largest = np.maximum(self._largest, outputs.pop(LARGEST))  # NaN propagates
        return outputs

    def check(self, name: str) -> float:
        """Return the largest number recorded.

        Raises:
            GateFailedError: If it exceeds the float16 range; the message names the node.
        """
        fits = self._largest <= LIMIT
        if not fits.all():
            first = int(np.argmin(fits))
            raise GateFailedError(
                f"{name}: node '{self._nodes[first]}' writes {self._largest[first]:g}, which exceeds the float16 "
                f"maximum of {LIMIT:g}; use --precision bf16"
            )
        return float(self._largest.max())
