"""Control networks of a bundle: each as a graph of its own, and the denoiser's graphs with residuals as inputs.

    controlnet.onnx, controlnet_2.onnx ...   residuals for a control image
    denoiser*.control.onnx                   for every graph of the denoiser (export/passes/controlled_graph.py)

Without control images the bundle runs the graphs that it would have without control networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import ExportConfig
from diffpress.compress.models.adapter import dummy_inputs
from diffpress.compress.models.components import Component
from diffpress.compress.models.control_network import EXAMPLES, load_controlnet
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.controlnet import control_sources
from diffpress.compress.sources.terms import read_terms, write_terms
from diffpress.export.components import export_component
from diffpress.export.denoiser import Denoiser, TargetGraph
from diffpress.export.graph.to_onnx import OUT
from diffpress.export.passes.controlled_graph import controlled_file, write_controlled_graph
from diffpress.export.targets.tensorrt import ENGINE as TENSORRT
from diffpress.export.verify.denoiser_check import portable_engines
from diffpress.export.verify.gate import ParityFailure, ParityGate
from diffpress.export.verify.parity import check_component
from diffpress.runtime.spec import DenoiserSpec

RESIDUAL_STD = 0.5  # of the residuals that the controlled graphs are verified with

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ExportedControls:
    """Manifest entries of control networks.

    Attributes:
        networks: Entries of their graphs, in the order of their images.
        controlled: File of a denoiser's graph -> entry of its controlled graph.
        failures: What failed parity.
    """

    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    controlled: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: tuple[ParityFailure, ...] = ()


def check_controls(checkpoint: Checkpoint, config: ExportConfig) -> None:
    """Raise InvalidInputError if a ControlNet of the config does not fit the checkpoint, before any work."""
    control_sources(checkpoint, config.controlnet)


def export_controls(denoiser: Denoiser, config: ExportConfig, folder: Path, gate: ParityGate) -> ExportedControls:
    """Write the control networks of the config, and the controlled graphs, into a bundle's folder, and verify them."""
    checkpoint, fixed_size = denoiser.checkpoint, config.size is not None
    networks: dict[str, dict[str, Any]] = {}
    failures: list[ParityFailure] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for source in control_sources(checkpoint, config.controlnet):
        write_terms({f"{source.name}.{name}": text for name, text in read_terms(source.folder).items()}, folder)
        component = load_controlnet(checkpoint, source, fixed_size)
        shapes = {name: array.shape for name, array in component.run_all(component.example_arrays).items()}
        dims = _dims(component, shapes, fixed_size)
        networks[source.name], failed = export_component(component, None, config.precision, folder, config, gate)
        failures += failed
    controlled = {}
    for one in (denoiser.portable, *denoiser.variants) if networks else ():
        file = controlled_file(one.file)
        size = write_controlled_graph(folder / one.file, folder / file, dims)
        controlled[one.file] = {"file": file, "residuals": list(dims), "bytes": size}
        if TENSORRT not in one.engines:
            parity, failed = _verified(denoiser, one, folder / file, shapes, config, gate)
            controlled[one.file]["parity"] = parity
            failures += failed
    return ExportedControls(networks, controlled, tuple(failures))


def _dims(component: Component, shapes: Shapes, fixed_size: bool) -> dict[str, list[int | str]]:
    """Return the dimensions of the residuals, dynamic ones by name: batch, height, height // 2 ..."""
    sides = component.examples["sample"].shape[2:]
    found: dict[str, list[int | str]] = {}
    for name, (_, channels, *own) in shapes.items():
        strides = [whole // side for whole, side in zip(sides, own, strict=True)]
        named = [f"{side} // {n}" if n > 1 else side for side, n in zip(("height", "width"), strides, strict=True)]
        found[name] = ["batch", channels, *(own if fixed_size else named)]
    return found


@dataclass(frozen=True)
class _Controlled:
    """The torch denoiser with residuals, evaluated once."""

    network: TorchNetwork
    example_arrays: dict[str, np.ndarray]

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {OUT: self.network.run(inputs)}


def _verified(
    denoiser: Denoiser, one: TargetGraph, path: Path, shapes: Shapes, config: ExportConfig, gate: ParityGate
) -> tuple[dict[str, float], tuple[ParityFailure, ...]]:
    """Compare a controlled graph with torch; the residuals are noise."""
    spec = denoiser.case.spec
    reference = _Controlled(TorchNetwork(denoiser.checkpoint.model, spec), _examples(spec, shapes))
    quantized = None
    if one.quantization is not None:
        model = fake_quantized(denoiser.checkpoint.evolve(quantization=one.quantization))
        quantized = replace(reference, network=TorchNetwork(model, spec))
    engines: Sequence[str] | None = one.engines or portable_engines(denoiser)
    return check_component(
        reference,
        path,
        quantized,
        engines=engines,
        threads=config.threads,
        precision=one.float_precision,
        gate=gate,
    )


def _examples(spec: DenoiserSpec, shapes: Shapes) -> dict[str, np.ndarray]:
    noise = np.random.Generator(np.random.Philox(2))
    inputs = {name: tensor.numpy() for name, tensor in dummy_inputs(spec, EXAMPLES).items()}
    return inputs | {
        name: np.float32(RESIDUAL_STD) * noise.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
