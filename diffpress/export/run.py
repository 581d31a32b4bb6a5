"""`diffpress compress`: run the stages, then export, measure and report.

The files of a run are listed in compress/workspace.py. (`export` may import `compress`, but not vice versa, so the
command that needs both is here.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from diffpress.compress.builtin import FEATURES
from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.evaluation.features import load_features
from diffpress.compress.pipeline import claim_folder, run_stages
from diffpress.compress.recipe import Recipe
from diffpress.compress.report import summary, write_report
from diffpress.compress.stages import STAGES
from diffpress.compress.training import distributed
from diffpress.compress.workspace import Workspace
from diffpress.export.bundle import check_export
from diffpress.export.comparison import write_comparison
from diffpress.export.run_bundles import baseline_bundle, result_bundle
from diffpress.export.scores import evaluate_bundles, evaluate_gates
from diffpress.export.targets.engine_cost import open_engine_costs
from diffpress.runtime.errors import GateFailedError
from diffpress.runtime.io.files import write_json
from diffpress.runtime.pipeline import Pipeline, resized

logger = logging.getLogger(__name__)


def run_recipe(
    open_teacher: Callable[[], Checkpoint],
    recipe: Recipe,
    out: Path,
    *,
    update: bool = False,
    where: str = "recipe",
    show: Callable[[str], None] = logger.info,
) -> None:
    """Run the recipe's stages, export, measure, report and check gates in `out`; resumes an unfinished run.

    `where` names the recipe in error messages; `show` receives the summary.

    Raises:
        GateFailedError: If a gate failed, after everything is written.
    """
    with distributed.together():
        with distributed.main_first():
            teacher = open_teacher()
            check_recipe(recipe, teacher, where)
            if distributed.is_main():
                claim_folder(out, teacher, recipe, update)
        checkpoint = run_stages(teacher, recipe, out, open_engine_costs)
    if distributed.is_main():
        export_and_report(checkpoint, teacher, recipe, out, show)


def check_recipe(recipe: Recipe, teacher: Checkpoint, where: str) -> None:
    """Raise errors that would otherwise occur at the end, before any work is done."""
    spec, size = teacher.spec, recipe.export.size
    if size is not None:
        spec = resized(spec, size)
    if recipe.evaluate is not None:
        load_features(FEATURES, spec)
    for number, stage in enumerate(recipe.stages):
        STAGES[stage.name].check(stage.config, teacher.spec, True, f"{where}: stages[{number}]")
    check_export(recipe.export, quantized=any(STAGES[stage.name].quantizes for stage in recipe.stages))


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
    bundle = result_bundle(checkpoint, teacher, recipe.export, workspace, baseline)
    scores = None
    with closing(Pipeline(bundle)) as ours, closing(Pipeline(baseline)) as theirs:
        write_comparison(ours, theirs, workspace.comparison)
        if recipe.evaluate is not None:
            logger.info("[evaluate]")
            scores = evaluate_bundles(
                ours.denoiser, bundle, theirs.denoiser, baseline, recipe.evaluate, workspace.evaluation
            )
    gates = evaluate_gates(recipe.gates, bundle, scores)
    write_json(workspace.gates, gates)
    show(summary(write_report(out)))
    show(f"bundle  {workspace.bundle}\nreport  {workspace.report_page}\nimages  {workspace.comparison}")
    failed = [f"{g['gate']} is {g['value']:.3f}, the bound is {g['bound']:g}" for g in gates if not g["passed"]]
    if failed:
        raise GateFailedError(f"{out}: gate failed: {'; '.join(failed)}. The work is kept")
