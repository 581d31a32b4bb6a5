"""Check that an engine compiles and runs the bundle's graph, and record what precision it executed.

    {engine, version of the library, the graph it runs and its sha256,
     integer_mac_share: of all multiply-accumulates, float_layers: how many, fallbacks: [{layer, reason}]}

`fallbacks` are layers that should run on integers but ran in float (see diffpress.runtime.engines.precision_report).
The last three are null if the graph is too large to be run again.

No OpenVINO IR is stored, because it would double the bundle without a benefit: for the default teacher, reading and
compiling took 744 ms from ONNX and 787 ms from IR in fp32, and 1925 and 1927 ms in int8 (medians in alternation). The
XML of a Q/DQ graph alone is a third of the size of the ONNX file.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

from diffpress.runtime.bundle import sha256
from diffpress.runtime.engines import load_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.network_inputs import dummy_inputs
from diffpress.runtime.spec import DenoiserSpec

BATCH = 2

# ONNX Runtime's precision report opens a session with all weights in memory
MAX_ONNXRUNTIME_BYTES = 2**30


def check_engine(
    name: str, graph: Path, spec: DenoiserSpec, size: int, promised: Collection[str] = ()
) -> dict[str, Any]:
    """Run `graph` in an installed engine and return its manifest entry.

    Args:
        name: The engine.
        graph: The ONNX file.
        spec: The denoiser's spec.
        size: Bytes of the graph with its weights.
        promised: Layers that should run on integers.

    Raises:
        MissingDependencyError: If the engine is not installed.
        InvalidInputError: If the engine cannot run the graph.
    """
    entry = {"engine": name, "version": importlib.metadata.version(name), "graph": graph.name}
    entry["graph_sha256"] = sha256(graph)
    if name == "onnxruntime" and size > MAX_ONNXRUNTIME_BYTES:
        return entry | dict.fromkeys(("integer_mac_share", "float_layers", "fallbacks"))
    # ONNX Runtime's report runs a session of its own: the engine's only names the inputs, unpacked
    options = EngineOptions(lean=name == "onnxruntime")
    with closing(load_engine(graph, name, options=options)) as engine:
        inputs = dummy_inputs(engine, spec, BATCH)
        if not options.lean:
            engine.run(inputs)
        precision_report = engine.precision_report(inputs, promised)
    return entry | {
        "integer_mac_share": round(precision_report.integer_mac_share, 3),
        "float_layers": len(precision_report.float_layers),
        "fallbacks": [{"layer": layer, "reason": reason} for layer, reason in precision_report.fallbacks.items()],
    }


def engine_check_line(entry: dict[str, Any], shown: int = 3) -> str:
    """Describe an entry of `check_engine` in one line, naming the first `shown` fallbacks."""
    head = f"{entry['engine']} {entry['version']}"
    if entry["integer_mac_share"] is None:
        return f"{head}: too large to run again, integer MACs not counted"
    line = f"{head}: integer MACs {100 * entry['integer_mac_share']:.1f} %, {entry['float_layers']} layers in float"
    if entry.get("emulated"):
        line += f" (it computes {' and '.join(entry['emulated'])} in float, no faster than fp32)"
    fallbacks = entry["fallbacks"]
    if not fallbacks:
        return line
    named = [f"{found['layer']} ({found['reason']})" for found in fallbacks[:shown]]
    if len(fallbacks) > shown:
        named.append(f"{len(fallbacks) - shown} more")
    return f"{line}, {len(fallbacks)} quantized layers fell back to float: {', '.join(named)}"
