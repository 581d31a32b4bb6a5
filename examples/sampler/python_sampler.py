"""Draw images with a bundle's sampler.onnx: numpy, onnxruntime and pillow, nothing of diffpress.

    python python_sampler.py BUNDLE --label 3 --seed 0 --count 4 --out image.png
    python python_sampler.py BUNDLE --prompt "a red cat" --negative-prompt "fog" --guidance 5 --out image.png

Image i starts from seed + i, and is the image that `diffpress sample` draws from that seed. A prompt is tokenized with
the tokenizers library (pip install tokenizers); --ids takes ids that were tokenized elsewhere. Models that are
conditioned on tensors need a script of their own, which feeds them by name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


def seeded_noise(seed: int, count: int, shape: list[int]) -> np.ndarray:
    """Standard normal noise [count, *shape], with a generator for each image."""
    generators = (np.random.Generator(np.random.Philox(key=seed + index)) for index in range(count))
    return np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])


def token_ids(bundle: Path, entry: dict[str, Any], text: str) -> tuple[list[int], list[int]]:
    """Ids and mask of a text, both of the entry's length."""
    from tokenizers import Tokenizer  # for prompts alone

    tokenizer = Tokenizer.from_file(str(bundle / entry["tokenizer"] / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(entry["length"])
    found = tokenizer.encode(text.lower().strip() if entry["lower"] else text).ids
    padding = entry["length"] - len(found)
    return found + [entry["pad"]] * padding, [1] * len(found) + [0] * padding


def conditioning(bundle: Path, inputs: dict[str, Any], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """All inputs besides noise, for args.count images."""
    feed: dict[str, Any] = {}
    for name, entry in inputs.items():
        if name == "labels":
            feed[name] = [args.label] * args.count
        elif name == "guidance":
            feed[name] = entry["default"] if args.guidance is None else args.guidance
        elif "tokenizer" in entry:
            text = args.negative_prompt if name.startswith("uncond_") else args.prompt
            if name == "input_ids" and args.ids:
                row = args.ids
            elif text is None and "default" in entry:
                row = entry["default"]
            elif text is None:
                raise SystemExit(f"{name}: give --prompt")
            else:
                row = token_ids(bundle, entry, text)["mask" in name]
            feed[name] = [row] * args.count
    return {name: np.asarray(value, inputs[name]["dtype"]) for name, value in feed.items()}


def starting_noise(inputs: dict[str, Any], args: argparse.Namespace) -> np.ndarray:
    """Noise float32 [count, C, H, W], from --noise or --seed."""
    shape = inputs["noise"]["shape"][1:]
    if args.noise is not None:
        return np.fromfile(args.noise, "<f4").reshape(args.count, *shape)
    noise = seeded_noise(args.seed, args.count, shape)
    if args.save_noise is not None:
        noise.astype("<f4").tofile(args.save_noise)
    return noise


def write_images(images: np.ndarray, args: argparse.Namespace) -> None:
    """Write images float32 [count, height, width, C] in 0..1 as --raw and --out ask."""
    if args.raw is not None:
        images.astype("<f4").tofile(args.raw)
    if args.out is not None:
        pixels = np.round(np.concatenate(list(images), axis=1) * 255).astype(np.uint8)
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(args.out)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--label", type=int, default=0)
    parser.add_argument("--prompt")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--ids", type=json.loads, help="token ids of the prompt as a JSON list")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--noise", type=Path, help="raw float32 noise [count, C, H, W], in place of a seed")
    parser.add_argument("--save-noise", type=Path, help="write the noise, to draw the same image elsewhere")
    parser.add_argument("--raw", type=Path, help="write the pixels as raw float32 [count, height, width, C]")
    parser.add_argument("--out", type=Path, help="write the images side by side")
    return parser


def main() -> None:
    args = arguments("Draw images with sampler.onnx.").parse_args()
    inputs = json.loads((args.bundle / "sampler.json").read_text(encoding="utf-8"))["inputs"]
    feed = {"noise": starting_noise(inputs, args), **conditioning(args.bundle, inputs, args)}
    session = onnxruntime.InferenceSession(args.bundle / "sampler.onnx", providers=["CPUExecutionProvider"])
    write_images(session.run(["images"], feed)[0], args)


if __name__ == "__main__":
    main()
