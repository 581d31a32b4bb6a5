"""The two bundles of a run: of the uncompressed model in fp32, and of the result.

Each is kept if it was made before with the same settings, which its manifest lists under `metrics`. Latencies of the
result are kept beside the bundle, because measuring again would give other numbers, and possibly another bundle.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpress.compress.checkpoint import Checkpoint, write_folder
from diffpress.compress.config import ExportConfig
from diffpress.compress.models.counts import count
from diffpress.compress.sources.controlnet import ControlSource, control_sources
from diffpress.compress.sources.weights import weight_files
from diffpress.compress.workspace import Workspace
from diffpress.export.bundle import export_bundle, measure_latencies
from diffpress.export.denoiser import PORTABLE, lower_denoiser
from diffpress.export.engine_variants import with_engine_variants
from diffpress.export.graph.model import save_graph
from diffpress.export.scores import running_parity
from diffpress.export.targets.genai.target import TARGET as GENAI
from diffpress.export.targets.sampler.target import TARGETS as SAMPLER_TARGETS
from diffpress.export.verify.gate import failures_of
from diffpress.export.verify.latency import Latency, read_latencies, slower_engines, write_latencies
from diffpress.runtime.bundle import MANIFEST, Bundle, load_bundle, sha256

logger = logging.getLogger(__name__)

RESULT_ONLY = (*SAMPLER_TARGETS, GENAI)  # targets that the baseline is not exported for


def baseline_bundle(teacher: Checkpoint, config: ExportConfig, workspace: Workspace) -> Bundle:
    """Return the bundle of the uncompressed model, in fp32, for any timesteps and without control networks."""
    changed = {"precision": "fp32", "fixed_timesteps": False, "controlnet": (), "nearest_plan": False, "lora_slots": 0}
    targets = tuple(target for target in config.targets if target not in RESULT_ONLY)
    plain = config.model_copy(update=changed | {"targets": targets})
    metrics = _settings(teacher, plain)
    found = _made_before(workspace.baseline, metrics)
    if found is None:
        found = export_bundle(
            teacher,
            workspace.baseline,
            plain,
            name="teacher",
            metrics=_set(metrics),
            latencies=(),
            keep_failed=True,
        )
        _log_parity("teacher", found)
    return found


def result_bundle(
    checkpoint: Checkpoint,
    teacher: Checkpoint,
    config: ExportConfig,
    workspace: Workspace,
    baseline: Bundle,
    parity_sqnr_db: float | None = None,
) -> Bundle:
    """Return the bundle to deploy; write its float graph, and the latency of int8 in each engine.

    A bundle that failed parity is kept: the gates of the run report it. `parity_sqnr_db` replaces the built-in bounds.
    """
    key = _settings(checkpoint, config) | {"fixed_timesteps": config.fixed_timesteps, "precision": config.precision}
    old, new = count(teacher.model, teacher.spec), count(checkpoint.model, checkpoint.spec)
    ratios = {"parameters_ratio": new.parameters / old.parameters, "macs_ratio": new.macs / old.macs}
    gate = {"parity_sqnr_db": parity_sqnr_db, "lora": _slots(config)}
    if checkpoint.quantization is None:
        workspace.latency.unlink(missing_ok=True)
    latencies = read_latencies(workspace.latency, key) if checkpoint.quantization else []
    if latencies is not None and workspace.float_graph.is_dir():
        found = _made_before(workspace.bundle, key | gate | ratios | _reverted(config, latencies))
        if found is not None:
            return found
    denoiser = with_engine_variants(lower_denoiser(checkpoint, config), config.threads)

    def write_traced(folder: Path) -> None:
        save_graph(denoiser.traced, folder / PORTABLE)

    write_folder(workspace.float_graph, write_traced)
    if latencies is None:
        latencies = measure_latencies(denoiser, config)
        write_latencies(workspace.latency, _set(key), latencies)
    bundle = export_bundle(
        checkpoint,
        workspace.bundle,
        config,
        name="student",
        metrics=_set(key | gate) | _reverted(config, latencies) | ratios,
        denoiser=denoiser,
        latencies=latencies,
        reuse=baseline if _same_components(checkpoint, teacher) else None,
        parity_sqnr_db=parity_sqnr_db,
        keep_failed=True,
    )
    _log_parity("student", bundle)
    return bundle


def _same_components(checkpoint: Checkpoint, teacher: Checkpoint) -> bool:
    """Return whether both are denoisers of one pipeline, whose other components are exported once."""
    ours, theirs = checkpoint.source, teacher.source
    folders = [folder and folder.resolve() for folder in (ours.pipeline_folder, theirs.pipeline_folder)]
    return folders[0] == folders[1] and ours.decoder is theirs.decoder


def _settings(checkpoint: Checkpoint, config: ExportConfig) -> dict[str, Any]:
    """Return what every bundle of the run depends on; settings that are None are not stored."""
    tensorrt = {"tensorrt": config.tensorrt.model_dump(mode="json")} if "tensorrt" in config.targets else {}
    size = None if config.size is None else list(config.size)
    facts: dict[str, Any] = {"checkpoint": checkpoint.hash, "targets": list(config.targets), **tensorrt, "size": size}
    facts["image_inputs"] = True if config.image_inputs else None
    facts["nearest_plan"] = True if config.nearest_plan else None
    facts["controlnet"] = [_digest(source) for source in control_sources(checkpoint, config.controlnet)] or None
    terms = checkpoint.source.terms
    return facts | (
        {"terms": {name: hashlib.sha256(text).hexdigest() for name, text in terms.items()}} if terms else {}
    )


def _digest(source: ControlSource) -> str:
    """Return the sha256 of a ControlNet's config and weights."""
    files = (source.folder / "config.json", *weight_files(source.folder))
    return hashlib.sha256(" ".join(sha256(file) for file in files).encode()).hexdigest()


def _slots(config: ExportConfig) -> list[Any] | None:
    return [config.lora_slots, config.lora_rank, config.lora_layers] if config.lora_slots else None


def _set(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _reverted(config: ExportConfig, latencies: Sequence[Latency]) -> dict[str, Any]:
    return {"reverted": slower_engines(latencies) if config.revert_slower else []}


def _made_before(folder: Path, metrics: dict[str, Any]) -> Bundle | None:
    """Return the existing bundle if it was made with these metrics."""
    if not (folder / MANIFEST).is_file():
        return None
    found = load_bundle(folder)
    stored = found.manifest["metrics"]
    if any(stored.get(name) != value for name, value in metrics.items()):
        return None
    logger.info(f"{folder}: done before")
    return found


def _log_parity(name: str, bundle: Bundle) -> None:
    for engine, row in running_parity(bundle).items():
        logger.info(
            f"{name}: {engine} against torch fp32: SQNR {row['sqnr_db']:.1f} dB, largest difference {row['max_abs']:g}"
        )
    for failure in failures_of(bundle):
        if failure.target:
            logger.warning(f"{name}: parity failed: {failure.message}")
