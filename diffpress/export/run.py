"""`diffpress compress`: run the stages, then export, measure and report.

The files of a run are listed in compress/workspace.py. (`export` may import `compress`, but not vice versa, so the
command that needs both is here.)
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from diffpress import __version__
from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.config import EvaluateConfig
from diffpress.compress.pipeline import check_start, claim_folder, load_teacher, run_stages
from diffpress.compress.recipe import Recipe
from diffpress.compress.report.profiles import measure_profiles
from diffpress.compress.report.summary import summary
from diffpress.compress.report.write import write_report
from diffpress.compress.stages import STAGES
from diffpress.compress.training import distributed
from diffpress.compress.workspace import Workspace, reserved
from diffpress.export.bundle import check_components, check_export
from diffpress.export.comparison import paired_scores, sample_pairs, write_comparison
from diffpress.export.components import check_image_inputs
from diffpress.export.controls import check_controls
from diffpress.export.denoiser import check_cached_steps
from diffpress.export.lora_graphs import check_lora_slots
from diffpress.export.model_card import write_model_card
from diffpress.export.run_bundles import baseline_bundle, result_bundle
from diffpress.export.scores import check_evaluation, evaluate_bundles, evaluate_gates
from diffpress.export.targets.engine_cost import open_engine_costs
from diffpress.export.targets.genai.target import check_genai
from diffpress.export.targets.web.target import check_web
from diffpress.export.verify.gate import cannot_sample
from diffpress.runtime.benchmarking.bench import machine
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import GateFailedError
from diffpress.runtime.image_size import resized
from diffpress.runtime.io.files import write_json
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "onnx")  # besides the engines, which `machine` names


def run_recipe(
    open_checkpoint: Callable[[], Checkpoint],
    recipe: Recipe,
    out: Path,
    *,
    update: bool = False,
    where: str = "recipe",
    command: Sequence[str] = (),
    show: Callable[[str], None] = logger.info,
) -> None:
    """Run the recipe's stages, export, measure, report and check gates in `out`; resumes an unfinished run.

    `where` names the recipe in error messages; `command` are the words of the command line, if there is one, which the
    report repeats; `show` receives the summary.

    Raises:
        GateFailedError: If a gate failed, after everything is written.
    """
    with ExitStack() as held:
        with distributed.together():
            with distributed.main_first():
                checkpoint = open_checkpoint()
                teacher = load_teacher(checkpoint, recipe)
                check_recipe(recipe, checkpoint, where)
                if distributed.is_main():
                    held.enter_context(reserved(out))
                    claim_folder(out, checkpoint, recipe, update, teacher)
                    facts = {"command": list(command), "machine": machine(), "versions": _versions()}
                    write_json(Workspace(out).invocation, facts)
            checkpoint = run_stages(checkpoint, recipe, out, open_engine_costs, teacher)
        if distributed.is_main():
            export_and_report(checkpoint, teacher, recipe, out, show)


def _versions() -> dict[str, str]:
    return {"diffpress": __version__, **{package: importlib.metadata.version(package) for package in PACKAGES}}


def check_recipe(recipe: Recipe, checkpoint: Checkpoint, where: str) -> None:
    """Raise errors that would otherwise occur at the end, before any work is done."""
    spec, size = checkpoint.spec, recipe.export.size
    if size is not None:
        spec = resized(spec, size)
    if recipe.evaluate is not None:
        check_evaluation(_evaluate_config(recipe, spec), recipe.gates, spec, where)
    check_start(checkpoint, recipe, where)
    for number, stage in enumerate(recipe.stages):
        STAGES[stage.name].check(stage.config, checkpoint.spec, True, f"{where}: stages[{number}]")
    for stage in recipe.stages:
        cache = getattr(stage.config, "cache", None)
        check_cached_steps(None if cache is None else cache.kind, recipe.export)
    check_export(recipe.export, quantized=any(STAGES[stage.name].quantizes for stage in recipe.stages))
    check_image_inputs(checkpoint, recipe.export)
    check_web(checkpoint, recipe.export)
    check_genai(checkpoint, recipe.export)
    check_controls(checkpoint, recipe.export)
    check_lora_slots(recipe.export)
    check_components(recipe.export, any(getattr(stage.config, "components", None) for stage in recipe.stages))


def export_and_report(
    checkpoint: Checkpoint, teacher: Checkpoint, recipe: Recipe, out: Path, show: Callable[[str], None] = logger.info
) -> None:
    """Export, measure, report and check gates.

    Raises:
        GateFailedError: If a gate failed, after everything is written.
    """
    workspace = Workspace(out)
    logger.info("[export]")
    save_checkpoint(checkpoint, workspace.checkpoint)
    baseline = baseline_bundle(teacher, recipe.export, workspace)
    bundle = result_bundle(checkpoint, teacher, recipe.export, workspace, baseline, recipe.gates.parity_sqnr_db)
    if cannot_sample(bundle):
        for file in (workspace.evaluation, workspace.comparison, workspace.pairs, workspace.comparison_arrays):
            file.unlink(missing_ok=True)  # of an earlier run
    scores = None if cannot_sample(bundle) else _compare(bundle, baseline, recipe, workspace)
    write_model_card(bundle, scores, workspace.comparison)
    gates = evaluate_gates(recipe.gates, bundle, scores)
    write_json(workspace.gates, gates)
    unmeasured = measure_profiles(workspace)
    if unmeasured is not None:
        logger.info(f"where the time goes was not measured: {unmeasured}")
    show(summary(write_report(out)))
    show(f"bundle  {workspace.bundle}\nreport  {workspace.report_page}")
    compared = workspace.compared()
    if compared is not None:
        show(f"images  {compared}")
    failed = [_failed_gate(gate) for gate in gates if not gate["passed"]]
    if failed:
        raise GateFailedError(f"{out}: gate failed: {'; '.join(failed)}. The work is kept")


def _failed_gate(gate: dict[str, Any]) -> str:
    found = gate.get("reason") or f"is {gate['value']:.3f}, the bound is {gate['bound']:g}"
    return f"{gate['gate']} {found}"


def _compare(bundle: Bundle, baseline: Bundle, recipe: Recipe, workspace: Workspace) -> dict[str, Any]:
    """Write the comparison image and the scores of both bundles; return the scores."""
    with closing(Pipeline(bundle)) as ours, closing(Pipeline(baseline)) as theirs:
        pairs = sample_pairs(ours, theirs, _prompts(recipe, ours.spec))
        write_comparison(pairs, workspace)
        if recipe.evaluate is None:
            scores = paired_scores(pairs)
            write_json(workspace.evaluation, scores)
        else:
            logger.info("[evaluate]")
            scores = evaluate_bundles(ours, theirs, _evaluate_config(recipe, ours.spec), workspace.evaluation)
    return scores


def _evaluate_config(recipe: Recipe, spec: DenoiserSpec) -> EvaluateConfig:
    assert recipe.evaluate is not None
    return recipe.evaluate.model_copy(update={"prompts": _prompts(recipe, spec)})


def _prompts(recipe: Recipe, spec: DenoiserSpec) -> Path | None:
    """Return the file of the prompts that the result is shown and scored with; None for the built-in ones."""
    named = None if recipe.evaluate is None else recipe.evaluate.prompts
    return named or (recipe.data if spec.conditioning.kind == "text" else None)
