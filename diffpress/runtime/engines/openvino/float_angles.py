"""Sines and cosines of the timestep in float32, also where the rest of the network runs in bfloat16 or float16.

    t -> * frequencies -> sine, cosine -> linear layer -> ...

bfloat16 holds 8 bits: t = 999 becomes 1000, and its angles are wrong by a radian. OpenVINO computes what leads to an
output of the model in the model's own type, up to the next product, so the sines and cosines become outputs, which
nobody reads. A Stable Diffusion 1.5 U-Net with small layers came from 22.4 to 43.6 dB at t = 999.
"""

from __future__ import annotations

from typing import Any

ANGLES = {"Sin", "Cos"}


def with_float_angles(model: Any) -> None:
    """Append the sines and cosines of an openvino.Model to its outputs, in place, if they are none yet."""
    from openvino import opset13 as op

    for operation in model.get_ops():
        readers = {target.get_node().get_type_name() for target in operation.output(0).get_target_inputs()}
        if operation.get_type_name() in ANGLES and "Result" not in readers:
            model.add_results([op.result(operation.output(0))])
