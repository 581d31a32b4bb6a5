"""Target `openvino`: prove that OpenVINO compiles and runs the bundle's graph, and leave a fingerprint of that.

No IR is stored, for it would double the bundle and gain nothing: on the default teacher, reading and compiling took
744 ms from the ONNX file and 787 ms from the IR in fp32, 1925 and 1927 ms in int8 (medians in alternation), and the
XML of a Q/DQ graph alone weighs a third of the ONNX file. A fingerprint says what was proven:

    {engine, version of the library, sha256 of the graph, share of the multiply-accumulates that ran on integers}
"""

from __future__ import annotations

import importlib.metadata
from contextlib import closing
from pathlib import Path
from typing import Any

from runtime.bundle import sha256
from runtime.denoise import network_inputs
from runtime.engines import load_engine
from runtime.spec import DenoiserSpec

BATCH = 2


def prove_openvino(graph: Path, spec: DenoiserSpec) -> dict[str, Any]:
    """The manifest entry of `graph` in the OpenVINO installed here.

    Raises MissingExtra where OpenVINO is not installed and BadInput where it does not take the graph.
    """
    with closing(load_engine(graph, "openvino")) as engine:
        inputs = network_inputs(engine, spec, BATCH)
        engine.run(inputs)
        share = engine.integer_mac_share(inputs)
    return {
        "engine": "openvino",
        "version": importlib.metadata.version("openvino"),
        "graph_sha256": sha256(graph),
        "integer_mac_share": round(share, 3),
    }
