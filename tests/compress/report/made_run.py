"""The folder of a run, as `compress`, `evaluate` and `bench` leave it, with made-up numbers and no compression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from diffpress.compress.config import StageConfig
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.compress.training.loss_log import LossLog
from diffpress.compress.workspace import Workspace
from diffpress.runtime.bundle import seal
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.make_tiny_bundle import spec

LAYERS = ("down.0.conv", "down.2.conv", "down.10.conv", "mid.attn", "out")
KEPT_IN_FLOAT = "out"
FELL_BACK = "mid.attn"
TEACHER_STEPS, BUNDLE_STEPS = 8, 3


def configs(count: int) -> list[tuple[str, StageConfig]]:
    """Return `count` stages: schedule and quantize around prune and recover in turn."""
    between: list[tuple[str, StageConfig]] = [
        ("prune", PruneConfig(ratio=0.25)),
        ("distill", RecoverConfig(steps=100, batch=4)),
    ]
    every = [("schedule", ScheduleConfig(solver="ddim", steps=3)), *(between[i % 2] for i in range(count - 2))]
    return [*every[: count - 1], ("quantize", QuantizeConfig(samples=4))]


def spread(mean: float, sd: float | None = 0.02) -> dict[str, Any]:
    return {"mean": mean, "sd": sd}


def score(mean: float, paired: bool = False) -> dict[str, Any]:
    return {
        "samples": 64,
        "seeds": 3,
        "features": {"name": "features.onnx", "sha256": "f" * 64},
        "frechet": spread(mean) | {"floor": 0.1},
        "kid": spread(mean / 10, 0.001),
        "paired": {"against": "teacher, same plan", "psnr_db": 26.5, "ssim": 0.91} if paired else None,
        "label_accuracy": 0.875,
        "reference": {"file": "reference.npz"},
    }


def row(name: str, engine: str, precision: str, steps: int, image_ms: float, batch: int = 1) -> dict[str, Any]:
    """A row of `bench --json`, against the torch row of 400 ms and the fp32 row of 100 ms."""
    return {
        "name": name,
        "engine": engine,
        "precision": precision,
        "batch": batch,
        "steps": steps,
        "nfe": steps,
        "step_ms": image_ms * batch / steps,
        "image_ms": image_ms,
        "load_ms": None,
        "size_mib": 1.5,
        "peak_mib": None,
        "integer_mac_share": None,
        "speedup_vs_torch": 400.0 / image_ms,
        "speedup_vs_same_engine": None if engine == "torch" else 100.0 / image_ms,
    }


def bench(bundle_ms: float = 20.0) -> dict[str, Any]:
    rows = [
        row("net (PyTorch eager)", "torch", "fp32", 50, 400.0),
        row("teacher", "openvino", "fp32", TEACHER_STEPS, 100.0),
        row("student", "openvino", "int8", BUNDLE_STEPS, bundle_ms),
    ]
    machine = {"cpu": "a processor", "cores": 2, "instruction_sets": ["avx2"], "engines": ["openvino"], "numpy": "2.0"}
    return {"machine": machine, "baseline": rows[0]["name"], "rows": rows, "sampler_overhead": {}, "left_out": {}}


def history(stages: int) -> list[dict[str, Any]]:
    """Return the records of `configs(stages)`; each stage removes a tenth of the network."""
    found = []
    for i, (name, config) in enumerate(configs(stages)):
        changed = {
            "parameters": [1000 - 50 * i, 950 - 50 * i],
            "macs": [10**9 - 5 * 10**7 * i, 95 * 10**7 - 5 * 10**7 * i],
            "plan": [f"ddim-{TEACHER_STEPS if i == 0 else BUNDLE_STEPS}", f"ddim-{BUNDLE_STEPS}"],
            "teacher_sqnr_db": 200.0 if i == 0 else 30.0 - i,
        }
        if name == "quantize":
            places = {layer: {"sqnr_db": 30.0 - i, "bytes": 10} for i, layer in enumerate(LAYERS)}
            changed["mixed"] = {"target": "openvino", "in_float": [KEPT_IN_FLOAT], "places": places}
        record = {"stage": name, "config": config.model_dump(mode="json"), "seed": 0, "changed": changed}
        found.append(record | {"before": f"{i:064x}", "after": f"{i + 1:064x}"})
    return found


def _bundle(folder: Path, name: str, size: int, of: DenoiserSpec, records: list[dict[str, Any]]) -> None:
    folder.mkdir()
    (folder / "denoiser.onnx").write_bytes(bytes(size))
    quantized = [layer for layer in LAYERS if layer != KEPT_IN_FLOAT] if records else []
    graph = {"file": "denoiser.onnx", "bytes": size, "quantized_layers": quantized, "variants": {}, "precision": "int8"}
    engine = {"engine": "openvino", "graph": "denoiser.onnx", "integer_mac_share": 0.9 if records else 0.0}
    engine |= {
        "float_layers": 1,
        "fallbacks": [{"layer": FELL_BACK, "reason": "no integer kernel matched"}] if records else [],
    }
    content = {"name": name, "spec": of.to_json(), "graphs": {"denoiser": graph}, "engines": [engine]}
    seal(folder, {**content, "history": records, "metrics": {}, "parity": {}})


def make_run(root: Path, stages: int = 3, command: tuple[str, ...] = ("diffpress", "compress"), **parts: Any) -> Path:
    """Make the folder of a run; each of `parts` (evaluation, bench, gates, latency) replaces one, None leaves it out.

    Further parts: `pictures`, `checkpoint`, `losses` and `invocation`, which are left out if they are False.
    """
    run = Workspace(root)
    root.mkdir(parents=True)
    records = history(stages)
    _bundle(run.baseline, "teacher", 4 * 2**20, spec().with_plan(make_plan("ddim", TEACHER_STEPS, spec().schedule)), [])
    _bundle(run.bundle, "student", 2**20, spec().with_plan(make_plan("ddim", BUNDLE_STEPS, spec().schedule)), records)
    files = {
        run.recipe: {"seed": 0},
        run.inputs: {"teacher": f"{0:064x}", "data": None},
        run.evaluation: parts.get("evaluation", {"baseline": score(0.8), "bundle": score(0.9, paired=True)}),
        run.bench: parts.get("bench", bench()),
        run.gates: parts.get("gates", [{"gate": "frechet_ratio", "bound": 1.5, "value": 1.125, "passed": True}]),
        run.latency: parts.get("latency"),
    }
    if parts.get("invocation", True):
        files[run.invocation] = {"command": list(command), "machine": bench()["machine"], "versions": {"torch": "2.9"}}
    for file, content in files.items():
        if content is not None:
            file.write_text(json.dumps(content))
    if parts.get("pictures", True):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 1), dtype=np.uint8)
        np.savez(run.pairs, teacher=pixels[0], bundle=pixels[1], prompts=np.array([], dtype=str))
    if parts.get("checkpoint", True):
        _checkpoint(run.checkpoint)
    if parts.get("losses", True):
        for i, record in enumerate(records):
            if record["stage"] == "distill":
                _stage_with_losses(run, i, record)
    return root


def _checkpoint(folder: Path) -> None:
    (folder / "unet").mkdir(parents=True)
    tensors = {f"{name}.weight": np.zeros((4, 4 + i), np.float32) for i, name in enumerate(LAYERS)}
    save_file(
        {**tensors, "norm.weight": np.zeros(4, np.float32)}, folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    quantization = {"format": "int8", "formats": {LAYERS[0]: "w4a8"}}
    (folder / "diffpress.json").write_text(json.dumps({"folder": "unet", "quantization": quantization}))


def _stage_with_losses(run: Workspace, number: int, record: dict[str, Any]) -> None:
    folder = run.stage(number, record["stage"], record["before"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diffpress.json").write_text(json.dumps({"hash": record["after"]}))
    log = LossLog(run.logs(folder), 0)
    for step in range(1, 501):
        log.add(step, 1.0 / step)
    log.write()
