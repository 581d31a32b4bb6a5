"""Quality cost of quantization: each row is a recipe, exported, and sampled in an engine with three seeds.

    python benchmarks/quantization_quality.py [--rows TEXT ...] [--samples 500] [--seeds 3] [--work DIR] [--json FILE]

    Frechet   distance of the samples to Fashion-MNIST's test images in the built-in features: mean and sd over seeds
    PSNR      of the samples against the fp32 samples of the same subject, from the same noise (256 samples)
    within    whether the mean exceeds that of the subject in fp32 by at most the larger of the two sds

Subjects are the built-in teacher under its own plan, an eight-step student pruned and recovered as in
compress/recipes/quick.yaml, and the same student in two steps. Stages are kept in --work, so a killed run resumes. The
int8 student is also loaded in a fresh process, sampled and exported again; bundle and figures must be identical. Needs
diffpress[compress].
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint

Stages = list[dict[str, Any]]

QUICK = "quick.yaml"
TEACHER: Stages = []
EIGHT_STEPS: Stages = [{"schedule": {"solver": "dpmpp_2m", "steps": 8, "spacing": "logsnr"}}]
TWO_STEPS: Stages = [{"schedule": {"solver": "dpmpp_2m", "steps": 2, "spacing": "logsnr"}}]
FLOAT = "fp32"
TRAINING = {"steps": 300, "warmup": 20}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8, all layers": {"keep_sensitive_layers": False},
    "int8, all layers, QAT": {"keep_sensitive_layers": False, "qat": {**TRAINING, "learning_rate": 2e-5}},
    "w4a8": {"format": "w4a8"},
    "w4a8, GPTQ": {"format": "w4a8", "gptq": True},
    "w4a8, QAT": {"format": "w4a8", "qat": {**TRAINING, "learning_rate": 1e-4}},
}
ROWS = {
    "teacher": (FLOAT, "int8"),
    "student, 8 steps": (FLOAT, *QUANTIZERS),
    "student, 2 steps": (FLOAT, "int8"),
}
PAIRED_SAMPLES, BATCH = 256, 50
AGAIN = "student, 8 steps: int8"


def subjects() -> dict[str, Stages]:
    """Return the stages of every subject before quantization; pruning and training are the demo recipe's."""
    import yaml

    from diffpress.compress.builtin import RECIPES

    stages = yaml.safe_load((RECIPES / QUICK).read_text())["stages"]
    student = EIGHT_STEPS + [stage for stage in stages if not stage.keys() & {"schedule", "quantize"}]
    return {"teacher": TEACHER, "student, 8 steps": student, "student, 2 steps": student + TWO_STEPS}


def made(stages: Stages, work: Path) -> Checkpoint:
    """Run the stages on the teacher; those already in `work` are loaded."""
    import yaml

    from diffpress.compress.builtin import TEACHER as FOLDER
    from diffpress.compress.pipeline import run_stages
    from diffpress.compress.recipe import Recipe
    from diffpress.compress.sources.load import load_checkpoint

    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump({"seed": 0, "data": "calib_data/calibration.npz", "stages": stages}))
    return run_stages(load_checkpoint(FOLDER), Recipe.load(file), work)


def measured(checkpoint: Checkpoint, bundle: Path, samples: int, seeds: int, reference: Path | None) -> dict[str, Any]:
    """Export the checkpoint and score its samples from the fastest installed engine."""
    from diffpress.compress.builtin import FEATURES, REFERENCE
    from diffpress.compress.config import EvaluateConfig
    from diffpress.compress.evaluation.evaluate import evaluate, paired
    from diffpress.compress.evaluation.features import load_features, load_reference
    from diffpress.compress.evaluation.subject import EvaluationSubject
    from diffpress.export.bundle import export_bundle
    from diffpress.runtime.bundle import load_bundle
    from diffpress.runtime.engines import available, load_engine

    exported, name = export_bundle(checkpoint, bundle, latencies=()), available()[-1]
    features = load_features(FEATURES, exported.spec)
    config = EvaluateConfig(samples=samples, seeds=seeds, batch=BATCH)
    with closing(load_engine(exported.graph("denoiser"), name)) as engine:
        subject = EvaluationSubject(engine, exported.spec)
        scores = evaluate(subject, config, features, load_reference(REFERENCE, features, exported.spec))
        if reference is not None:
            paired_config = config.model_copy(update={"samples": PAIRED_SAMPLES})
            with closing(load_engine(load_bundle(reference).graph("denoiser"), name)) as other:
                scores["paired"] = paired(subject, EvaluationSubject(other, exported.spec), paired_config, FLOAT)
    return scores | {"engine": name, "bundle": exported.hash}


def within(found: Mapping[str, float], baseline: Mapping[str, float]) -> bool:
    """Return whether a Fréchet distance exceeds the baseline by at most the larger of their sds."""
    return found["mean"] - baseline["mean"] <= max(found["sd"], baseline["sd"])


def repeated(checkpoint: Checkpoint, work: Path, samples: int, seeds: int) -> dict[str, Any]:
    """Save the checkpoint and return what a fresh process measures after loading it."""
    from diffpress.compress.checkpoint import save_checkpoint

    folder, out = work / "saved", work / "again.json"
    save_checkpoint(checkpoint, folder)
    arguments = ["--again", str(folder), "--samples", str(samples), "--seeds", str(seeds), "--json", str(out)]
    subprocess.run([sys.executable, __file__, *arguments, "--work", str(work)], check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def row(subject: str, kind: str, scores: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    frechet = scores["frechet"]
    return {
        "subject": subject,
        "quantized": kind,
        "frechet": frechet,
        "frechet_ratio": frechet["mean"] / base["frechet"]["mean"],
        "within_noise": within(frechet, base["frechet"]),
        "psnr_db": scores["paired"]["psnr_db"] if scores["paired"] else None,
        "label_accuracy": scores["label_accuracy"],
        "engine": scores["engine"],
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    print("\n| subject | quantized | Frechet | / fp32 | within | PSNR dB | labels |\n|---|---|---|---|---|---|---|")
    for r in rows:
        psnr = "-" if r["psnr_db"] is None else f"{r['psnr_db']:.1f}"
        print(
            f"| {r['subject']} | {r['quantized']} | {r['frechet']['mean']:.3f} ± {r['frechet']['sd']:.3f} "
            f"| {r['frechet_ratio']:.3f} | {'yes' if r['within_noise'] else 'no'} | {psnr} "
            f"| {r['label_accuracy']:.3f} |",
            flush=True,
        )


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    rows, same, stages = [], None, subjects()
    for subject, kinds in ROWS.items():
        requested = [kind for kind in kinds if not args.rows or any(text in f"{subject}: {kind}" for text in args.rows)]
        base: dict[str, Any] = {}
        floats = work / _plain(f"{subject} {FLOAT}")
        for kind in [FLOAT, *(kind for kind in requested if kind != FLOAT)] if requested else []:
            quantize = [] if kind == FLOAT else [{"quantize": {"samples": 32, "batch": 16, **QUANTIZERS[kind]}}]
            checkpoint = made(stages[subject] + quantize, work)
            bundle, reference = work / _plain(f"{subject} {kind}"), None if kind == FLOAT else floats
            scores = measured(checkpoint, bundle, args.samples, args.seeds, reference)
            base = base or scores
            rows.append(row(subject, kind, scores, base))
            show(rows[-1:])
            if f"{subject}: {kind}" == AGAIN:
                again = repeated(checkpoint, work, args.samples, args.seeds)
                same = {name: again[name] == scores[name] for name in ("bundle", "frechet", "kid")}
                print(f"loaded, sampled and exported again in a fresh process: identical {same}", flush=True)
    show(rows)
    return {"samples": args.samples, "seeds": args.seeds, "rows": rows, "identical_after_reload": same}


def _plain(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", metavar="TEXT", help="only rows 'SUBJECT: KIND' that contain one of these")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for stages and bundles (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--again", metavar="CHECKPOINT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.again:
            from diffpress.compress.sources.load import load_checkpoint

            report = measured(load_checkpoint(args.again), work / "again", args.samples, args.seeds, None)
        else:
            report = run(args, work)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
