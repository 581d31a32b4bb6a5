"""Quality of pruned networks at equal MACs and after an equal recovery: what a criterion is worth.

    python benchmarks/pruning_quality.py [ARM ...] [--checkpoint DIR] [--data NPZ] [--steps 1000] [--seeds 1]
        --work DIR [--json FILE]

Each arm prunes the checkpoint to 0.56 of its MACs, with the same ratio in every layer unless it says otherwise, and
recovers it with the same settings:

    taylor, diff_pruning, magnitude, random    the criteria of `prune`
    torch_pruning       torch-pruning's own pruner and Taylor importance, with the gradients of `taylor`: it removes the
                        same positions of all normalization groups
    global              diff_pruning, with the ratio distributed over the layers
    depth               whole blocks, chosen by ablation
    scratch             the network of diff_pruning with new random weights
    teacher             the checkpoint itself, not trained

Each trained network is sampled in OpenVINO under the checkpoint's sampling plan, and scored as `evaluate` does. Rows
are written to --json when they are done and are not measured again; a killed arm resumes from its last save.
Needs diffpress[compress,openvino].
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint
    from diffpress.compress.context import Context

MACS = 0.56
BISECTIONS = 10
GRADIENTS = {"batch": 32, "timesteps": 24}
RECOVERY = {"batch": 32, "learning_rate": 5e-4, "warmup": 50, "ema": 0.995, "save_every": 50, "precision": "bf16"}


def by_stage(settings: dict[str, Any]) -> Callable[[Checkpoint, Context], Checkpoint]:
    """Return a function that prunes by one `prune` stage."""

    def pruned(teacher: Checkpoint, ctx: Context) -> Checkpoint:
        from pydantic import TypeAdapter

        from diffpress.compress.pruning.prune import AnyPruneConfig, prune

        config = TypeAdapter(AnyPruneConfig).validate_python({**settings, "target": {"macs": MACS}})
        return prune(teacher, config, ctx)

    return pruned


def by_torch_pruning(teacher: Checkpoint, ctx: Context) -> Checkpoint:
    """Prune with torch-pruning's own pruner, to the largest network within the target."""
    import torch_pruning as tp

    from diffpress.compress.models.adapter import adapter_for, dummy_inputs
    from diffpress.compress.models.counts import count
    from diffpress.compress.pruning.config import PruneConfig
    from diffpress.compress.pruning.importance import importance_of

    adapter, inputs = adapter_for(teacher.model), dummy_inputs(teacher.spec, 2)
    whole = count(teacher.model, teacher.spec).macs
    graded = teacher.clone_model().eval()
    importance_of(graded, teacher, PruneConfig(method="taylor", **GRADIENTS), ctx)
    gradients = {name: parameter.grad for name, parameter in graded.named_parameters()}

    def pruned(ratio: float) -> Checkpoint:
        model = teacher.clone_model().eval()
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        modules = dict(model.named_modules())
        ignored = [modules[name] for name in adapter.fixed(model)]
        ignored += [m.layer for heads in adapter.attentions(model) for m in heads.members if m.side == "out"]
        pruner = tp.pruner.BasePruner(
            model,
            inputs,
            tp.importance.GroupTaylorImportance(),
            pruning_ratio=ratio,
            round_to=8,
            ignored_layers=ignored,
            forward_fn=lambda m, x: adapter.forward(m, x),
        )
        pruner.step()
        model.zero_grad(set_to_none=True)
        adapter.refresh_(model)
        return teacher.evolve(model=model)

    low, high, found = 0.0, 0.9, None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        smaller = pruned(ratio)
        if count(smaller.model, smaller.spec).macs > MACS * whole:
            low = ratio
        else:
            high, found = ratio, smaller
    assert found is not None, "torch-pruning does not reach the target"
    return found


def from_scratch(teacher: Checkpoint, ctx: Context) -> Checkpoint:
    """Prune by diff_pruning and give all layers new random weights."""
    import torch

    smaller = ARMS["diff_pruning"](teacher, ctx)
    model = smaller.clone_model()
    torch.manual_seed(ctx.seed)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return smaller.evolve(model=model)


ARMS: dict[str, Callable[[Checkpoint, Context], Checkpoint]] = {
    "teacher": lambda teacher, ctx: teacher,
    "diff_pruning": by_stage({"method": "diff_pruning", **GRADIENTS}),
    "random": by_stage({"method": "random"}),
    "torch_pruning": by_torch_pruning,
    "depth": by_stage({"kind": "depth"}),
    "taylor": by_stage({"method": "taylor", **GRADIENTS}),
    "scratch": from_scratch,
    "global": by_stage({"method": "diff_pruning", "scope": "global", **GRADIENTS}),
    "magnitude": by_stage({"method": "magnitude"}),
}


def measured(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Prune, recover and score one network."""
    from diffpress.compress.config import EvaluateConfig
    from diffpress.compress.context import Context
    from diffpress.compress.distillation.config import RecoverConfig
    from diffpress.compress.distillation.recover import recover
    from diffpress.compress.evaluation.evaluate import evaluate, open_features, open_reference
    from diffpress.compress.evaluation.open_subject import open_subject
    from diffpress.compress.evaluation.teacher_sqnr import teacher_sqnr_db
    from diffpress.compress.models.counts import count
    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.compress.training.sample_data import load_samples
    from diffpress.export.bundle import export_bundle
    from diffpress.runtime.engines.options import EngineOptions

    teacher = load_checkpoint(args.checkpoint)
    work = args.work / f"{arm}-{seed}-{args.steps}"
    ctx = Context(seed, work / "recovery", teacher, load_samples(args.data, teacher.spec), shared=args.work)
    began = time.monotonic()
    small = ARMS[arm](teacher, ctx)
    pruned_db = teacher_sqnr_db(small, teacher, ctx.data)
    if small is not teacher:
        small = recover(small, RecoverConfig(steps=args.steps, **RECOVERY), ctx)
    before, after = (count(one.model, one.spec) for one in (teacher, small))
    row = {
        "arm": arm,
        "seed": seed,
        "steps": args.steps,
        "macs": round(after.macs / before.macs, 3),
        "params": round(after.parameters / before.parameters, 3),
        "pruned_sqnr_db": pruned_db,
        "recovered_sqnr_db": teacher_sqnr_db(small, teacher, ctx.data),
        "train_s": round(time.monotonic() - began),
    }
    print(json.dumps(row), flush=True)
    if not (work / "bundle" / "manifest.json").is_file():
        export_bundle(small, work / "bundle")
    config = EvaluateConfig(samples=args.samples, seeds=3, batch=50)
    subject = open_subject(str(work / "bundle"), "openvino", EngineOptions(threads=args.threads))
    features = open_features(config, subject.spec, args.threads)
    assert features is not None
    scores = evaluate(subject, config, features, open_reference(config, features, subject.spec), what=arm)
    subject.close()
    return {**row, "frechet": scores["frechet"], "kid": scores["kid"], "samples": args.samples}


def main() -> None:
    """Measure the arms that are missing in --json and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", choices=[*ARMS, []], metavar="ARM")
    parser.add_argument("--checkpoint", default="calib_data/teacher")
    parser.add_argument("--data", type=Path, default=Path("calib_data/calibration.npz"))
    parser.add_argument("--steps", type=int, default=1000, help="steps of the recovery")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each arm; each is sampled with three seeds")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    from diffpress.runtime.io.files import write_json

    file = args.json or args.work / "rows.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for seed in range(args.seeds):
        for arm in args.arms or ARMS:
            key = f"{arm}, seed {seed}, {args.steps} steps, {args.samples} samples"
            if key not in rows:
                rows[key] = measured(arm, seed, args)
                write_json(file, rows)
            print(json.dumps(rows[key]), flush=True)


if __name__ == "__main__":
    main()
