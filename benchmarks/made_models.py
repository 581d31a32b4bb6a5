"""What the subjects of a race run, made in steps: the network, recorded inputs, fp32 ONNX, our bundle, NNCF's IR.

    write -> fit -> record      inputs of sets A and B, outputs of B and its final x_0, by the float model in torch
                 -> float       fp32 ONNX file
                 -> ptq -> export
    record, float -> nncf       in an environment of its own
                  -> roofline   peaks of the machine

Set A calibrates: it is the trajectory that diffpress's calibration samples, so every quantizer sees the same inputs.
Set B, from other noise under the same plan, is what everything is compared on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from fitted_network import fit_network, load_network, write_network
from quantization import has_dot_products
from real_size_models import MODELS, Model

if TYPE_CHECKING:
    from diffpress.runtime.spec import DenoiserSpec

SAMPLES = 1  # trajectories of each set; one evaluation holds both halves of guidance
COMPARED_SEED = 20_000_000  # noise of set B; that of set A is CALIBRATION_SEED
NNCF_SCRIPT = Path(__file__).parent / "peers" / "nncf_ptq.py"

Evaluation = tuple[dict[str, np.ndarray], np.ndarray]  # inputs and output


@dataclass(frozen=True)
class Race:
    """Where the files of one race are.

    Attributes:
        name: Key of MODELS.
        small: Whether it runs at the small scale.
        work: Folder of all races.
    """

    name: str
    small: bool
    work: Path

    @property
    def model(self) -> Model:
        return MODELS[self.name]

    @property
    def title(self) -> str:
        return f"{self.name}-small" if self.small else self.name

    @property
    def folder(self) -> Path:
        return self.work / self.title

    @property
    def network(self) -> Path:
        return self.folder / "network"

    @property
    def inputs(self) -> Path:
        return self.folder / "inputs"

    @property
    def float_graph(self) -> Path:
        return self.folder / "float" / "denoiser.onnx"

    @property
    def layer_names(self) -> Path:
        return self.folder / "float" / "layers.json"

    @property
    def int8_checkpoint(self) -> Path:
        return self.folder / "int8"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def nncf_graph(self) -> Path:
        return self.folder / "nncf" / "denoiser.xml"


@dataclass(frozen=True)
class Making:
    """One step of making.

    Attributes:
        run: Makes it and returns entries of its row; `seconds_of` among them divides its time into named parts.
        needs: Steps that must be finished before.
        peer: Returns the arguments of Python in the peers' environment, in which the step runs instead.
    """

    run: Callable[[Race], dict[str, Any]] | None
    needs: tuple[str, ...] = ()
    peer: Callable[[Race], list[str]] | None = None


def _write(race: Race) -> dict[str, Any]:
    return write_network(race.model, race.small, race.network)


def _fit(race: Race) -> dict[str, Any]:
    return fit_network(race.model, race.network)


def record(race: Race) -> dict[str, Any]:
    """Sample the float model in torch from the noise of both sets and store every evaluation."""
    from diffpress.compress.models.torch_network import TorchNetwork
    from diffpress.compress.seeds import CALIBRATION_SEED

    checkpoint = load_network(race.model, race.network)
    network = TorchNetwork(checkpoint.model, checkpoint.spec)
    race.inputs.mkdir(parents=True, exist_ok=True)
    (race.inputs / "spec.json").write_text(json.dumps(checkpoint.spec.to_json()))
    for name, first_seed in (("A", CALIBRATION_SEED), ("B", COMPARED_SEED)):
        evaluations, final = sampled(network, checkpoint.spec, first_seed)
        np.save(race.inputs / f"{name}-final.npy", final)
        for index, (inputs, output) in enumerate(evaluations):
            np.savez(race.inputs / f"{name}-{index}.npz", **inputs)  # type: ignore[arg-type]
            np.save(race.inputs / f"{name}-{index}.npy", output)
    return {"evaluations": len(evaluations), "std_of_x0": round(float(final.std()), 3)}


def sampled(network: Any, spec: DenoiserSpec, first_seed: int) -> tuple[list[Evaluation], np.ndarray]:
    """Sample SAMPLES trajectories under the spec's plan; return all evaluations and the final x_0 [N, C, H, W]."""
    from diffpress.runtime.network_inputs import dummy_conditioning
    from diffpress.runtime.sampler import generate

    evaluations: list[Evaluation] = []

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        output = network.run(inputs)
        evaluations.append((inputs, output))
        return output

    seeds = range(first_seed, first_seed + SAMPLES)
    # without the attributes of an engine, the sampler's loop evaluates it step by step
    recording = SimpleNamespace(inputs=network.inputs, run=run)
    return evaluations, generate(recording, spec, seeds, batch=SAMPLES, conditions=dummy_conditioning(spec, SAMPLES))


def recorded(race: Race, name: str) -> list[Evaluation]:
    """Read the evaluations of set A or B."""
    files = sorted(race.inputs.glob(f"{name}-*.npz"), key=lambda file: int(file.stem.partition("-")[2]))
    return [(dict(np.load(file)), np.load(file.with_suffix(".npy"))) for file in files]


def spec_of(race: Race) -> DenoiserSpec:
    """Read the spec of the float model."""
    from diffpress.runtime.spec import DenoiserSpec

    return DenoiserSpec.from_json(json.loads((race.inputs / "spec.json").read_text()))


def _float(race: Race) -> dict[str, Any]:
    from diffpress.export.graph.model import save_graph
    from diffpress.export.graph.to_onnx import to_onnx

    checkpoint = load_network(race.model, race.network)
    race.float_graph.parent.mkdir(parents=True, exist_ok=True)
    save_graph(to_onnx(checkpoint.model, checkpoint.spec), race.float_graph)
    layers = [name for name, layer in checkpoint.model.named_modules() if getattr(layer, "weight", None) is not None]
    race.layer_names.write_text(json.dumps(layers))
    return {}


def quantize_config() -> Any:
    """Return the settings of our quantization: the defaults, on the samples of set A."""
    from diffpress.compress.quantization.config import QuantizeConfig

    return QuantizeConfig(samples=SAMPLES, batch=SAMPLES, reduce_range=not has_dot_products())


def _ptq(race: Race) -> dict[str, Any]:
    from diffpress.compress.checkpoint import save_checkpoint
    from diffpress.compress.context import Context
    from diffpress.compress.quantization.quantize import quantize

    checkpoint = load_network(race.model, race.network)
    context = Context(0, race.folder / "ptq-work", checkpoint)
    save_checkpoint(quantize(checkpoint, quantize_config(), context), race.int8_checkpoint)
    return context.notes


def _export(race: Race) -> dict[str, Any]:
    import torch

    from diffpress.compress.config import ExportConfig
    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.export.bundle import export_bundle
    from diffpress.export.denoiser import lower_denoiser
    from diffpress.export.engine_variants import with_engine_variants

    start = time.perf_counter()
    checkpoint = load_checkpoint(race.int8_checkpoint, dtype=getattr(torch, race.model.dtype))
    config = ExportConfig(targets=("onnx", "openvino"))
    denoiser = with_engine_variants(lower_denoiser(checkpoint, config))
    lowered = time.perf_counter()
    bundle = export_bundle(checkpoint, race.bundle, config, denoiser=denoiser, keep_failed=True)
    failures = [entry["message"] for entry in bundle.manifest.get("parity_failures", []) if entry["target"]]
    seconds_of = {"export": lowered - start, "write and parity": time.perf_counter() - lowered}
    return {"seconds_of": seconds_of, "parity": bundle.manifest["parity"], "parity_failures": failures}


def _nncf(race: Race) -> list[str]:
    files = [str(race.inputs / f"A-{index}.npz") for index in range(len(recorded(race, "A")))]
    flags = [] if has_dot_products() else ["--no-dot-products"]
    return [str(NNCF_SCRIPT), str(race.float_graph), str(race.nncf_graph), *flags, "--inputs", *files]


def _roofline(race: Race) -> dict[str, Any]:
    from roofline import measure

    return measure(race)


MAKINGS: dict[str, Making] = {
    "write": Making(_write),
    "fit": Making(_fit, ("write",)),
    "record": Making(record, ("fit",)),
    "float": Making(_float, ("fit",)),
    "roofline": Making(_roofline, ("record", "float")),
    "ptq": Making(_ptq, ("fit",)),
    "export": Making(_export, ("ptq",)),
    "nncf": Making(None, ("record", "float"), peer=_nncf),
}


def needed(steps: Sequence[str]) -> list[str]:
    """Return these steps and all that they need, in the order of MAKINGS."""
    found = set(steps)
    for name in reversed(MAKINGS):  # a step needs earlier ones only
        if name in found:
            found.update(MAKINGS[name].needs)
    return [name for name in MAKINGS if name in found]
