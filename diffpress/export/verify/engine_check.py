"""Prove that an engine compiles and runs the bundle's graph, and leave a fingerprint of what it really executed.

    {engine, version of the library, the graph it takes and its sha256,
     integer_mac_share: of all multiply-accumulates, float_layers: how many, fallbacks: [{layer, reason}]}

`fallbacks` are layers that the graph promises on integers and the engine ran in float (see diffpress.runtime.engines.precision_report).
The last three are null for a graph that is too large for the engine to be run a second time.

No OpenVINO IR is stored, for it would double the bundle and gain nothing: on the default teacher, reading and compiling
took 744 ms from the ONNX file and 787 ms from the IR in fp32, 1925 and 1927 ms in int8 (medians in alternation), and
the XML of a Q/DQ graph alone weighs a third of the ONNX file.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

from diffpress.runtime.bundle import sha256
from diffpress.runtime.engines import load_engine
from diffpress.runtime.network_inputs import dummy_inputs
from diffpress.runtime.spec import DenoiserSpec

BATCH = 2

# ONNX Runtime's account takes two more sessions of the graph, each with its weights in memory
MAX_ONNXRUNTIME_BYTES = 2**30


def check_engine(
    name: str, graph: Path, spec: DenoiserSpec, size: int, promised: Collection[str] = ()
) -> dict[str, Any]:
    """The manifest entry of `graph` (`size` bytes with its weights) in the engine `name` that is installed here.

    `promised` are the layers that should run on integers. Raises MissingDependencyError where the engine is not installed and
    InvalidInputError where it does not take the graph.
    """
    entry = {"engine": name, "version": importlib.metadata.version(name), "graph": graph.name}
    entry["graph_sha256"] = sha256(graph)
    if name == "onnxruntime" and size > MAX_ONNXRUNTIME_BYTES:
        return entry | dict.fromkeys(("integer_mac_share", "float_layers", "fallbacks"))
    with closing(load_engine(graph, name)) as engine:
        inputs = dummy_inputs(engine, spec, BATCH)
        engine.run(inputs)
        precision_report = engine.precision_report(inputs, promised)
    return entry | {
        "integer_mac_share": round(precision_report.integer_mac_share, 3),
        "float_layers": len(precision_report.float_layers),
        "fallbacks": [{"layer": layer, "reason": reason} for layer, reason in precision_report.fallbacks.items()],
    }


def engine_check_line(entry: dict[str, Any], shown: int = 3) -> str:
    """An entry of `check_engine` in words, with the first `shown` fallbacks by name."""
    head = f"{entry['engine']} {entry['version']}"
    if entry["integer_mac_share"] is None:
        return f"{head}: too large to be run again, integer MACs not counted"
    line = f"{head}: integer MACs {100 * entry['integer_mac_share']:.1f} %, {entry['float_layers']} layers in float"
    if entry.get("emulated"):
        line += f" (it computes {' and '.join(entry['emulated'])} in float, no faster than fp32)"
    fallbacks = entry["fallbacks"]
    if not fallbacks:
        return line
    named = [f"{found['layer']} ({found['reason']})" for found in fallbacks[:shown]]
    if len(fallbacks) > shown:
        named.append(f"{len(fallbacks) - shown} more")
    return f"{line}, {len(fallbacks)} of the promised fell back: {', '.join(named)}"
