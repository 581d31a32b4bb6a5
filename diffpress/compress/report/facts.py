"""All facts of a report, collected from the files that a run wrote: the content of report.json.

Everything else in this package is a function of them, besides the pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffpress.compress.report.layers import layers_of
from diffpress.compress.report.lineage import lineage_of, training_curves
from diffpress.compress.report.profiles import profiles_of, with_profile
from diffpress.compress.report.verdict import verdict_of
from diffpress.compress.workspace import Workspace
from diffpress.runtime.benchmarking.bench import COLUMNS
from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json, read_json_value
from diffpress.runtime.sampler import evaluated_levels, network_evaluations
from diffpress.runtime.spec import DenoiserSpec

CURVE_POINTS = 120  # of the noise schedule
MAX_DB = 60.0  # of a signal-to-noise ratio: clean data and pure noise have none


def collect(folder: Path) -> dict[str, Any]:
    """Return the facts of the compress run in `folder`.

    Raises:
        InvalidInputError: `folder` is not the folder of a run, or a file of it cannot be read.
    """
    run = Workspace(folder)
    if not run.recipe.is_file():
        raise InvalidInputError(f"{folder}: not the folder of a compress run, it has no {run.recipe.name}")
    bundle, baseline = load_bundle(run.bundle), load_bundle(run.baseline)
    onnx_mib, baseline_mib = (b.manifest["graphs"]["denoiser"]["bytes"] / 2**20 for b in (bundle, baseline))
    history = bundle.manifest["history"]
    profiles = profiles_of(run, {"baseline": baseline, "bundle": bundle})
    facts: dict[str, Any] = {
        "name": folder.resolve().name,
        "bundle": {"hash": bundle.hash, "denoiser_mib": onnx_mib, "size_ratio": onnx_mib / baseline_mib}
        | _described(bundle),
        "baseline": {"hash": baseline.hash, "denoiser_mib": baseline_mib} | _described(baseline),
        "components": _components(bundle, baseline),
        "recipe": read_json(run.recipe),
        "history": history,
        "parity": bundle.manifest["parity"],
        "engines": bundle.manifest["engines"],
        "variants": bundle.manifest["graphs"]["denoiser"].get("variants", {}),
        "evaluation": _read(run.evaluation),
        "gates": _read(run.gates),
        "latency": _read(run.latency),
        "bench": _bench(run.bench),
        "schedule": _schedule(bundle.spec),
        "profile": profiles,
        "layers": with_profile(layers_of(run.checkpoint, bundle.manifest, history), profiles),
        "training": training_curves(run, history),
        "lineage": lineage_of(history, bundle.hash, _read(run.inputs) or {}),
        "run": _read(run.invocation),
    }
    return facts | {"verdict": verdict_of(facts)}


def _described(bundle: Bundle) -> dict[str, Any]:
    """Return the bundle's name and sampling plan, with the signal-to-noise ratio of every evaluation."""
    spec, plan = bundle.spec, bundle.spec.plan
    return {
        "name": bundle.manifest.get("name"),
        "is_pixel_space": spec.is_pixel_space,
        "plan": {
            "solver": plan.solver,
            "timesteps": list(plan.timesteps),
            "guidance": plan.guidance,
            "evaluations": network_evaluations(spec),
            "corrected": bool(plan.output_corrections),
            "step_cache": None if plan.cache is None else _step_cache(plan.cache),
            "fixed_timesteps": bool(spec.fixed_timesteps),
            "distilled": spec.distilled,
            "levels": [[level.t, _snr_db(level.alpha, level.sigma)] for level in evaluated_levels(spec)],
        },
    }


def _step_cache(cache: StepCache) -> str:
    """Return what the steps of a plan with a cache evaluate, in words."""
    counts = ", ".join(f"{count} {kind}" for kind, count in cache.counts.items())
    return f"{counts} ({cache.cut or f'order {cache.order}'})"


def _schedule(spec: DenoiserSpec) -> list[list[float]]:
    """Return [timestep, signal-to-noise ratio in dB] along the noise schedule."""
    timesteps = np.unique(np.linspace(0, len(spec.schedule) - 1, CURVE_POINTS).round().astype(int))
    alphas, sigmas = spec.schedule.alphas, spec.schedule.sigmas
    return [[int(t), _snr_db(alphas[t], sigmas[t])] for t in timesteps]


def _snr_db(alpha: float, sigma: float) -> float:
    with np.errstate(divide="ignore"):
        ratio = 20.0 * (np.log10(alpha) - np.log10(sigma))
    return round(float(np.clip(ratio, -MAX_DB, MAX_DB)), 2)


def _components(bundle: Bundle, baseline: Bundle) -> dict[str, dict[str, Any]]:
    """Return the size and precision of the other components, and what quantizing them costs in the image."""
    changed = [record["changed"].get("components", {}) for record in bundle.manifest["history"]]
    notes = {name: note for notes in changed for name, note in notes.items()}
    before = baseline.manifest["graphs"]
    return {
        name: {
            "mib": entry["bytes"] / 2**20,
            "baseline_mib": before[name]["bytes"] / 2**20,
            "precision": entry["precision"],
            **{key: value for key, value in notes.get(name, {}).items() if key.endswith("_db")},
        }
        for name, entry in bundle.manifest["graphs"].items()
        if name != "denoiser" and name in before  # an encoder may be in one of them alone
    }


def _bench(path: Path) -> dict[str, Any] | None:
    """Return the benchmark that the user wrote into the folder; InvalidInputError if it is something else."""
    if not path.is_file():
        return None
    found = read_json(path)
    rows, keys = found.get("rows"), {key for key, _ in COLUMNS.values()}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
        raise InvalidInputError(f"{path}: not the result of 'diffpress bench --json'; write that here, or remove it")
    return found | {"machine": found.get("machine", {})}


def _read(path: Path) -> Any:
    return read_json_value(path) if path.is_file() else None
