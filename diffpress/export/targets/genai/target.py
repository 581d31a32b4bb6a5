"""Target `genai`: what is checked before any work, and what is added to a bundle."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import ExportConfig
from diffpress.compress.sources.layout import read_layout
from diffpress.export.denoiser import Denoiser
from diffpress.export.targets.genai.folder import PIPELINES, write_genai_folder
from diffpress.export.targets.genai.schedulers import genai_plan
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError

logger = logging.getLogger(__name__)

TARGET = "genai"


def check_genai(checkpoint: Checkpoint, config: ExportConfig) -> None:
    """Check before any work that OpenVINO GenAI has a pipeline for the model, if it is a target.

    Raises:
        InvalidInputError: It has none.
        MissingDependencyError: `openvino_tokenizers` is not installed.
    """
    if TARGET not in config.targets:
        if config.nearest_plan:
            raise InvalidInputError(f"nearest_plan is for target {TARGET}; add the target, or leave it out")
        return
    for package in ("openvino", "openvino_tokenizers"):
        if find_spec(package) is None:
            raise MissingDependencyError(package, TARGET, f"target {TARGET}")
    source = checkpoint.source
    layout = None if source.pipeline_folder is None else read_layout(source.pipeline_folder)
    name = None if layout is None else layout.pipeline
    if layout is None or name not in PIPELINES:
        what = f"a {name}" if name else "a model without text encoder and decoder"
        raise InvalidInputError(
            f"target {TARGET}: OpenVINO GenAI cannot open {what}; it opens {', '.join(PIPELINES)} as exported here"
        )
    decoder = layout.class_in_index("vae") or ""
    if decoder != "AutoencoderKL":
        raise InvalidInputError(f"target {TARGET}: OpenVINO GenAI has no decoder of class '{decoder}'; leave it out")
    if checkpoint.spec.conditioning.inpainting:
        raise InvalidInputError(f"target {TARGET}: networks for inpainting are not supported; leave the target out")


def check_genai_plan(checkpoint: Checkpoint, config: ExportConfig) -> None:
    """Raise InvalidInputError if OpenVINO GenAI is a target and cannot follow the plan (see `genai_plan`)."""
    if TARGET in config.targets:
        genai_plan(checkpoint.spec, checkpoint.source.scheduler, config.nearest_plan)


def genai_content(
    denoiser: Denoiser, components: dict[str, dict[str, Any]], config: ExportConfig, folder: Path
) -> dict[str, Any]:
    """Write the folder into a bundle's `folder` if it is a target, and return what the manifest gains.

    Args:
        denoiser: The exported denoiser.
        components: Manifest entries of the other graphs.
        config: The export's settings.
        folder: The bundle's folder, which holds all graphs.
    """
    if TARGET not in config.targets:
        return {}
    checkpoint = denoiser.checkpoint
    plan = genai_plan(checkpoint.spec, checkpoint.source.scheduler, config.nearest_plan)
    if plan.changes:
        logger.warning(
            f"target {TARGET}: OpenVINO GenAI cannot follow the plan's {', '.join(plan.changes)}; its folder samples "
            f"with {plan.plan.steps} steps of {plan.plan.solver}"
        )
    graphs = {"denoiser": folder / denoiser.graph_for("openvino").file}
    graphs |= {name: folder / entry["file"] for name, entry in components.items()}
    return {TARGET: write_genai_folder(checkpoint, plan, graphs, folder)}
