"""Target sampler: sampler.onnx (+ .data above 2 GiB) and sampler.json in a bundle, verified against the runtime.

Target triton has them as well, and a model repository of them (export/targets/triton.py).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from diffpress.compress.config import ExportConfig
from diffpress.export.graph.opsets import opset_of
from diffpress.export.targets.sampler.build import ENGINE, build_sampler
from diffpress.export.targets.sampler.description import describe_sampler
from diffpress.export.targets.sampler.placement import save_sampler
from diffpress.export.targets.sampler.supported import checked_program
from diffpress.export.targets.sampler.verify import verify_sampler
from diffpress.export.targets.triton import write_repository
from diffpress.export.verify.gate import failures_of
from diffpress.export.verify.parity import runs
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import write_json
from diffpress.runtime.spec import DenoiserSpec

SAMPLER, DESCRIPTION = "sampler.onnx", "sampler.json"
TARGETS = ("sampler", "triton", "web")  # targets that have a sampler


def check_sampler(spec: DenoiserSpec, config: ExportConfig) -> None:
    """Check before any work that a model's plan can be a sampler graph, if one is a target.

    Raises:
        InvalidInputError: It cannot, or ONNX Runtime does not run the precision.
    """
    if not wants_sampler(config):
        return
    if ENGINE not in runs(config.precision):
        raise InvalidInputError(
            f"target sampler: ONNX Runtime cannot run precision {config.precision} on the CPU; use fp16 or fp32"
        )
    checked_program(spec)


def wants_sampler(config: ExportConfig) -> bool:
    """Return whether a target of the export has a sampler."""
    return any(target in TARGETS for target in config.targets)


def sampler_content(bundle: Bundle, config: ExportConfig) -> dict[str, Any]:
    """Write the sampler of a bundle that is not sealed yet into its folder, if a target has one.

    Args:
        bundle: The bundle, with its graphs in the folder, and its manifest without files.
        config: Settings of the export.

    Returns:
        What the manifest gets: `sampler` {file, description, opset, bytes, parity, triton}, and the failures with its
        own.

    Raises:
        InvalidInputError: The plan, the conditioning or the samples cannot be expressed in one graph.
    """
    if not wants_sampler(config):
        return {}
    graph = build_sampler(bundle)
    size = save_sampler(graph, bundle.path / SAMPLER)
    description = describe_sampler(bundle, bundle.spec_for(ENGINE), graph, SAMPLER)
    write_json(bundle.path / DESCRIPTION, description)
    parity, failures = verify_sampler(bundle, SAMPLER, config.threads)
    entry = {"file": SAMPLER, "description": DESCRIPTION, "opset": opset_of(graph), "bytes": size, "parity": parity}
    if "triton" in config.targets:
        entry["triton"] = write_repository(bundle.path, SAMPLER, description)
    if not failures:
        return {"sampler": entry}
    return {"sampler": entry, "parity_failures": [asdict(one) for one in (*failures_of(bundle), *failures)]}
