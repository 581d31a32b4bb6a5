"""Quality of text-to-image models on the icons of the built-in text-to-image teacher.

    python benchmarks/text_to_image.py BUNDLE [--steps N] [--solver S] [--guidance W] [--json FILE]
        [--save IMAGES.npz] [--against IMAGES.npz]

    Frechet, KID   one image for each of the 1,140 names (icons/captions.txt), against icons/reference.npz, in the
                   features of icons/features/model.onnx
    retrieval      of the held-out prompts (icons/prompts.txt): how often the named icon is the nearest of all names
    colour         of the same images: how often the background has the prompt's colour, by the median of the frame
    psnr_db        of the same images: to those that another model saved, from the same noise
    ms_per_image   one prompt to one image, with text encoder and decoder: median of TIMED images. With `--eager`,
                   alternating with that pipeline in diffusers, in PyTorch eager with EAGER_STEPS steps of DDIM
    mib            size of all graphs

Prints one JSON line per seed, and one with mean and standard deviation. `--real icons.npz` gives the same scores of
real images. Needs diffpress[compress].
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from diffpress.compress.evaluation.features import FeatureNetwork, Reference
    from diffpress.compress.evaluation.subject import EvaluationSubject
    from diffpress.runtime.pipeline import Pipeline
    from diffpress.runtime.spec import DenoiserSpec

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH, TIMED = 64, 9
EAGER_STEPS = 50
PROMPT = "flat red apple on blue"
HELD_OUT, ALL_NAMES = "prompts.txt", "captions.txt"

# (prompts, number of the seed) -> one image for each prompt, uint8 [N, 3, H, W]
Drawn = Callable[[Sequence[str], int], np.ndarray]


def sampled(subject: EvaluationSubject) -> Drawn:
    """Return a function that samples one image for each prompt."""
    from diffpress.compress.seeds import EVALUATION_SEED
    from diffpress.runtime.io.images import to_uint8
    from diffpress.runtime.sampler import generate_batches

    def draw(prompts: Sequence[str], seed: int) -> np.ndarray:
        assert subject.encode is not None, "the model encodes no prompts"
        noise_seeds = np.arange(len(prompts)) + (seed + 1) * EVALUATION_SEED
        conditions = subject.encode(prompts, subject.spec)
        batches = generate_batches(subject.network, subject.spec, noise_seeds, batch=BATCH, conditions=conditions)
        images = np.concatenate([subject.decode(samples) for samples in batches])
        return np.ascontiguousarray(to_uint8(images, subject.spec.data_range).transpose(0, 3, 1, 2))

    return draw


def real(icons: Path) -> Drawn:
    """Return a function that composes the image that each prompt names."""
    from icons import load_icons

    loaded = load_icons(icons)
    captions = {caption: number for number, caption in enumerate(loaded.captions())}
    return lambda prompts, seed: loaded.images(np.array([captions[prompt] for prompt in prompts]))


def timings(pipeline: Pipeline, spec: DenoiserSpec, eager: Path | None) -> dict[str, float]:
    """Return the median times from a prompt to its image, after one that is not counted."""

    def bundle_image(seed: int) -> None:
        conditions = pipeline.conditions(1, spec, prompts=[PROMPT])
        np.concatenate(list(pipeline.images([seed], conditions, spec, batch=1)))

    subjects: dict[str, Callable[[int], object]] = {"ms_per_image": bundle_image}
    if eager is not None:
        subjects = {"eager_ms_per_image": _eager(eager), **subjects}
    milliseconds: dict[str, list[float]] = {name: [] for name in subjects}
    for seed in range(TIMED + 1):
        for name, draw in subjects.items():
            began = time.perf_counter()
            draw(seed)
            milliseconds[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values[1:]) for name, values in milliseconds.items()}


def _eager(folder: Path) -> Callable[[int], object]:
    """Return a function that draws one image with diffusers, with the guidance of the folder's own plan."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from diffpress.compress.sources.diffusers_folder import spec_of_folder

    found = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    found.scheduler = DDIMScheduler.from_config(found.scheduler.config)
    found.set_progress_bar_config(disable=True)
    weight = spec_of_folder(folder).plan.guidance

    def draw(seed: int) -> object:
        generator = torch.Generator().manual_seed(seed)
        return found(PROMPT, num_inference_steps=EAGER_STEPS, guidance_scale=weight, generator=generator)

    return draw


def scores(
    draw: Drawn, data: Path, features: FeatureNetwork, reference: Reference, seed: int
) -> tuple[dict[str, float], np.ndarray]:
    """Return all scores of one seed, and the images of the held-out prompts."""
    from icons import COLOURS, background_colours

    from diffpress.compress.evaluation.metrics import frechet_distance, kernel_distance, moments
    from diffpress.compress.evaluation.prompt_adherence import prompt_adherence
    from diffpress.runtime.io.prompt_file import read_prompt_file

    assert features.embed_pixels is not None
    every_name = features.embed_pixels(draw(read_prompt_file(data / ALL_NAMES), seed).transpose(0, 2, 3, 1))
    prompts = read_prompt_file(data / HELD_OUT)
    images = draw(prompts, seed)
    embedded = features.embed_pixels(images.transpose(0, 2, 3, 1))
    adherence = prompt_adherence(prompts, features, data / "names.txt")
    assert adherence is not None, f"{features.name} has no text encoder"
    wanted = np.array([list(COLOURS).index(prompt.rpartition(" ")[2]) for prompt in prompts])
    found = {
        "frechet": frechet_distance(*moments(every_name), *moments(reference.features)),
        "kid": kernel_distance(every_name, reference.features, reference.kernel_within),
        "retrieval": adherence.retrieval(embedded),
        "clip_score": adherence.clip_score(embedded),
        "colour": float((background_colours(images) == wanted).mean()),
    }
    return found, images


def main() -> int:
    parser = argparse.ArgumentParser(description="Score a text-to-image model on icons.")
    parser.add_argument("subject", nargs="?", metavar="BUNDLE")
    parser.add_argument("--eager", type=Path, metavar="FOLDER", help="pipeline to time in PyTorch eager as well")
    parser.add_argument("--save", type=Path, metavar="NPZ", help="write the images of the held-out prompts")
    parser.add_argument("--against", type=Path, metavar="NPZ", help="the images that the PSNR is to")
    parser.add_argument("--real", type=Path, metavar="ICONS", help="score real images instead: npz of make_icons.py")
    parser.add_argument("--steps", type=int, help="denoising steps other than the sampling plan's")
    parser.add_argument("--solver", help="solver other than the sampling plan's")
    parser.add_argument("--guidance", type=float, help="guidance weight other than the sampling plan's")
    parser.add_argument("--seeds", type=int, default=3, help="0 measures the time only")
    parser.add_argument("--data", type=Path, help="the icons folder (default: the built-in one)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if (args.subject is None) == (args.real is None):
        parser.error("name a model, or real images with --real")
    sys.path.insert(0, str(EXAMPLES))

    from diffpress.compress.builtin import CALIB_DATA
    from diffpress.compress.evaluation.features import load_features, load_reference
    from diffpress.compress.evaluation.metrics import psnr_db
    from diffpress.compress.evaluation.subject import pipeline_subject
    from diffpress.compress.sources.diffusers_folder import spec_of_folder
    from diffpress.runtime.bundle import load_bundle
    from diffpress.runtime.io.arrays import read_npz
    from diffpress.runtime.pipeline import Pipeline
    from diffpress.runtime.requested_plan import plan_description, requested_spec

    data = args.data or CALIB_DATA / "icons"
    features = load_features(data / "features" / "model.onnx", spec_of_folder(data / "teacher"))
    reference = load_reference(data / "reference.npz", features, spec_of_folder(data / "teacher"))
    expected = None if args.against is None else read_npz(args.against)["images"]
    if expected is not None and len(expected) < args.seeds:
        parser.error(f"--against {args.against}: has images of {len(expected)} seeds, not {args.seeds}")
    result: dict[str, Any] = {"subject": args.subject or "real images"}
    if args.real is not None:
        rows = [scores(real(args.real), data, features, reference, 0)[0]]
    else:
        with ExitStack() as stack:
            pipeline = stack.enter_context(Pipeline(load_bundle(args.subject)))
            spec = requested_spec(pipeline.spec, args.steps, args.solver, guidance=args.guidance)
            subject = pipeline_subject(pipeline).with_spec(spec)
            result["plan"] = plan_description(spec)
            result |= timings(pipeline, spec, args.eager)
            result["mib"] = sum(entry["bytes"] for entry in pipeline.bundle.manifest["graphs"].values()) / 2**20
            rows, images = [], []
            for seed in range(args.seeds):
                row, drawn = scores(sampled(subject), data, features, reference, seed)
                if expected is not None:
                    row["psnr_db"] = psnr_db(expected[seed].astype(np.float64), drawn.astype(np.float64), 255.0)
                rows.append(row)
                images.append(drawn)
                print(json.dumps({"seed": seed} | row), flush=True)
        if args.save is not None and images:
            np.savez_compressed(args.save, images=np.stack(images))
    result["seeds"] = len(rows)
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        result[name] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
    print(json.dumps(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
