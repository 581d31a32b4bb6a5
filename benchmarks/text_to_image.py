"""Quality of text-to-image models on the icons of the built-in text-to-image teacher.

    python benchmarks/text_to_image.py BUNDLE_OR_CHECKPOINT [--steps N] [--guidance W] [--seeds 3] [--json FILE]

    Frechet, KID   one image for each of the 1,140 names (icons/captions.txt), against icons/reference.npz, in the
                   features of icons/features/model.onnx
    retrieval      of the held-out prompts (icons/prompts.txt): how often the named icon is the nearest of all names
    colour         of the same images: how often the background has the prompt's colour, by the median of the frame

Prints one JSON line per seed, and one with mean and standard deviation. `--real icons.npz` gives the same scores of
real images. Needs diffpress[compress].
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from diffpress.compress.evaluation.features import FeatureNetwork, Reference
    from diffpress.compress.evaluation.subject import EvaluationSubject

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH = 64
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


def scores(draw: Drawn, data: Path, features: FeatureNetwork, reference: Reference, seed: int) -> dict[str, float]:
    """Return all scores of one seed."""
    from icons import COLOURS, background_colours

    from diffpress.compress.evaluation.metrics import frechet_distance, kernel_distance, moments
    from diffpress.compress.evaluation.prompt_adherence import prompt_adherence
    from diffpress.runtime.io.prompt_file import read_prompt_file

    assert features.embed_pixels is not None
    found = {}
    for file in (ALL_NAMES, HELD_OUT):
        prompts = read_prompt_file(data / file)
        images = draw(prompts, seed)
        embedded = features.embed_pixels(images.transpose(0, 2, 3, 1))
        if file == ALL_NAMES:
            found["frechet"] = frechet_distance(*moments(embedded), *moments(reference.features))
            found["kid"] = kernel_distance(embedded, reference.features, reference.kernel_within)
            continue
        adherence = prompt_adherence(prompts, features, data / "names.txt")
        assert adherence is not None, f"{features.name} has no text encoder"
        wanted = np.array([list(COLOURS).index(prompt.rpartition(" ")[2]) for prompt in prompts])
        found["retrieval"], found["clip_score"] = adherence.retrieval(embedded), adherence.clip_score(embedded)
        found["colour"] = float((background_colours(images) == wanted).mean())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Score a text-to-image model on icons.")
    parser.add_argument("subject", nargs="?", metavar="BUNDLE_OR_CHECKPOINT")
    parser.add_argument("--real", type=Path, metavar="ICONS", help="score real images instead: npz of make_icons.py")
    parser.add_argument("--steps", type=int, help="denoising steps other than the sampling plan's")
    parser.add_argument("--guidance", type=float, help="guidance weight other than the sampling plan's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="the icons folder (default: the built-in one)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if (args.subject is None) == (args.real is None):
        parser.error("name a model, or real images with --real")
    sys.path.insert(0, str(EXAMPLES))

    from diffpress.compress.builtin import CALIB_DATA
    from diffpress.compress.evaluation.features import load_features, load_reference
    from diffpress.compress.evaluation.open_subject import open_subject
    from diffpress.compress.sources.diffusers_folder import spec_of_folder
    from diffpress.runtime.requested_plan import requested_spec

    data = args.data or CALIB_DATA / "icons"
    features = load_features(data / "features" / "model.onnx", spec_of_folder(data / "teacher"))
    reference = load_reference(data / "reference.npz", features, spec_of_folder(data / "teacher"))
    if args.real is not None:
        rows = [scores(real(args.real), data, features, reference, 0)]
    else:
        with closing(open_subject(args.subject)) as subject:
            subject = subject.with_spec(requested_spec(subject.spec, args.steps, guidance=args.guidance))
            rows = []
            for seed in range(args.seeds):
                rows.append(scores(sampled(subject), data, features, reference, seed))
                print(json.dumps({"seed": seed} | rows[-1]), flush=True)
    result: dict[str, Any] = {"subject": args.subject or "real images", "seeds": len(rows), "steps": args.steps}
    for name in rows[0]:
        values = [row[name] for row in rows]
        result[name] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
    print(json.dumps(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
