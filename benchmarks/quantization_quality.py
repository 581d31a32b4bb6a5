"""What quantization costs in quality: every row a recipe, exported and sampled by an engine, three seeds.

    python benchmarks/quantization_quality.py [--rows TEXT ...] [--samples 500] [--seeds 3] [--work DIR] [--json FILE]

    Frechet   distance of the samples to Fashion-MNIST's test images in the built-in features: mean and sd over seeds
    PSNR      of the samples to the same subject's in fp32, from the same noise (256 samples)
    within    whether the mean is within the spread (the larger sd of the two) of the subject's in fp32, or below it

Subjects are the built-in teacher by its own plan, a student of eight steps pruned and recovered as in
compress/recipes/quick.yaml, and that student in two steps. Stages are kept in --work: a run that was killed goes on.
The int8 student is also read in a fresh process, sampled and exported again: bundle and figures must be the same.
Needs diffpress[compress].
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
TRAINING = {"mode": "qat", "steps": 300, "batch": 16, "warmup": 20}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8, nothing kept": {"keep_sensitive_layers": False},
    "int8, nothing kept, QAT": {"keep_sensitive_layers": False, **TRAINING, "learning_rate": 2e-5},
    "w4a8": {"format": "w4a8"},
    "w4a8, AdaRound": {"format": "w4a8", "rounding": "gptq"},
    "w4a8, QAT": {"format": "w4a8", **TRAINING, "learning_rate": 1e-4},
}
ROWS = {
    "teacher": (FLOAT, "int8"),
    "student, 8 steps": (FLOAT, *QUANTIZERS),
    "student, 2 steps": (FLOAT, "int8"),
}
PAIRED_SAMPLES, BATCH = 256, 50
AGAIN = "student, 8 steps: int8"


def subjects() -> dict[str, Stages]:
    """Stages of every subject before it is quantized; pruning and training are those of the demo's recipe."""
    import yaml

    from diffpress.compress.builtin import RECIPES

    stages = yaml.safe_load((RECIPES / QUICK).read_text())["stages"]
    student = EIGHT_STEPS + [stage for stage in stages if not stage.keys() & {"schedule", "quantize"}]
    return {"teacher": TEACHER, "student, 8 steps": student, "student, 2 steps": student + TWO_STEPS}


def made(stages: Stages, work: Path) -> Checkpoint:
    """The teacher after these stages, of which those in `work` are read."""
    import yaml

    from diffpress.compress.builtin import TEACHER as FOLDER
    from diffpress.compress.pipeline import run_stages
    from diffpress.compress.recipe import read_recipe
    from diffpress.compress.sources.load import load_checkpoint

    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump({"seed": 0, "data": "calib_data/calibration.npz", "stages": stages}))
    return run_stages(load_checkpoint(FOLDER), read_recipe(file), work)


def measured(checkpoint: Checkpoint, bundle: Path, samples: int, seeds: int, reference: Path | None) -> dict[str, Any]:
    """Export the checkpoint, and score what the fastest engine installed samples from it."""
    from diffpress.compress.builtin import FEATURES, REFERENCE
    from diffpress.compress.config import EvaluateConfig
    from diffpress.compress.evaluation.evaluate import evaluate, paired
    from diffpress.compress.evaluation.features import load_features, load_reference
    from diffpress.export.bundle import write_bundle
    from diffpress.runtime.bundle import load_bundle
    from diffpress.runtime.engines import available, load_engine

    exported, name = write_bundle(checkpoint, bundle), available()[-1]
    features = load_features(FEATURES, exported.spec)
    config = EvaluateConfig(samples=samples, seeds=seeds, batch=BATCH)
    with closing(load_engine(exported.graph("denoiser"), name)) as engine:
        scores = evaluate(engine, exported.spec, config, features, load_reference(REFERENCE, features, exported.spec))
        if reference is not None:
            fewer = config.model_copy(update={"samples": PAIRED_SAMPLES})
            with closing(load_engine(load_bundle(reference).graph("denoiser"), name)) as other:
                scores["paired"] = paired(engine, other, exported.spec, fewer, FLOAT)
    return scores | {"engine": name, "bundle": exported.hash}


def within(found: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    """Whether a Frechet distance is no further above the other than the larger of their spreads."""
    return found["mean"] - wanted["mean"] <= max(found["sd"], wanted["sd"])


def repeated(checkpoint: Checkpoint, work: Path, samples: int, seeds: int) -> dict[str, Any]:
    """What a fresh process measures of the checkpoint that is saved here and read there."""
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
        asked = [kind for kind in kinds if not args.rows or any(text in f"{subject}: {kind}" for text in args.rows)]
        base: dict[str, Any] = {}
        floats = work / _plain(f"{subject} {FLOAT}")
        for kind in [FLOAT, *(kind for kind in asked if kind != FLOAT)] if asked else []:
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
                print(f"read, sampled and exported again in a fresh process: identical {same}", flush=True)
    show(rows)
    return {"samples": args.samples, "seeds": args.seeds, "rows": rows, "identical_after_reload": same}


def _plain(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", metavar="TEXT", help="only rows 'SUBJECT: KIND' that hold one of these")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder to keep stages and bundles in (default: a temporary one)")
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
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
