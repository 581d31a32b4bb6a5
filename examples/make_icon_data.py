r"""Build the icons part of the data folder: the text-to-image teacher and what calibrates and scores it.

    icons/teacher/         the teacher as a StableDiffusionPipeline folder with its sampling plan, weights as float16
    icons/student/         a few-step student of it as a diffpress checkpoint, weights stored as float16
    icons/features/        the encoders that score (train_icon_features.py)
    icons/calibration.npz  captioned training images: x uint8 [512, 64, 64, 3], caption str [512]
    icons/prompts.txt      the prompts kept out of training
    icons/captions.txt     one caption for each name, in any style and colour: prompts for the Frechet distance
    icons/names.txt        all names: the candidates of retrieval
    icons/reference.npz    features [4560, D] of real images, every icon over two colours

The same inputs give the same bytes on the same machine.

    python examples/make_icon_data.py --icons icons.npz --teacher TEACHER --features FEATURES --out calib_data

`--training FILE` writes all training images with their captions as well, in random order, for students to learn from.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
from data_manifest import fingerprint, write_json, write_manifest
from diffusers import StableDiffusionPipeline
from icons import COLOURS, Icons, load_icons
from make_calib_data import save_npz
from safetensors.numpy import load_file, save_file
from torch import float16

from diffpress.compress.checkpoint import RECORD
from diffpress.compress.sources.load import load_checkpoint

CALIBRATION_IMAGES = 512
REFERENCE_COLOURS = 2  # per icon
PLAN = {"solver": "ddim", "steps": 50, "guidance": 2.0}
FEATURE_FILES = ("model.onnx", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
SEED = 0


def save_teacher(source: Path, out: Path) -> None:
    """Copy a pipeline with float16 weights, which load as float32, and its plan, without the paths of this machine."""
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(source).to(dtype=float16)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{source}: not a StableDiffusionPipeline folder: {error}") from error
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out, safe_serialization=True)
    for file in (out / "model_index.json", *out.glob("*/config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if "dtype" in config:  # transformers loads in this type, diffusers in float32
            config["dtype"] = "float32"
        write_json(file, config)
    write_json(out / RECORD, {"plan": PLAN})


def save_student(source: Path, out: Path) -> None:
    """Copy the denoiser of a diffpress checkpoint with float16 weights; its other components are the teacher's."""
    if not (source / RECORD).is_file():
        raise SystemExit(f"{source}: not a diffpress checkpoint, it has no {RECORD}")
    shutil.rmtree(out, ignore_errors=True)
    for part in ("unet", "scheduler"):
        shutil.copytree(source / part, out / part)
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: weight.astype(np.float16) for name, weight in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})
    description = json.loads((source / RECORD).read_text(encoding="utf-8")) | {"pipeline": "../teacher"}
    write_json(out / RECORD, description)
    write_json(out / RECORD, description | {"hash": load_checkpoint(str(out)).hash})


def one_caption_per_name(icons: Icons) -> list[str]:
    """Return one caption for each name, in a random style and over a random colour, in the order of the names."""
    rng = np.random.default_rng([SEED, 1])
    captions = icons.captions()
    chosen = [rng.choice(np.flatnonzero(icons.names == name)) for name in np.unique(icons.names)]
    return [captions[icon * len(COLOURS) + rng.integers(len(COLOURS))] for icon in chosen]


def save_captioned(icons: Icons, combinations: np.ndarray, path: Path) -> None:
    """Write combinations as captioned images: x uint8 [N, H, W, 3] and caption str [N]."""
    captions = icons.captions()
    images = icons.images(combinations).transpose(0, 2, 3, 1)
    save_npz(path, x=images, caption=np.array([captions[one] for one in combinations]))


def save_reference(icons: Icons, network: Path, path: Path, batch: int = 240) -> None:
    """Write the features of every icon over REFERENCE_COLOURS different colours."""
    rng = np.random.default_rng([SEED, 2])
    colours = np.stack([rng.permutation(len(COLOURS))[:REFERENCE_COLOURS] for _ in icons.rgba])
    combinations = (np.arange(len(icons.rgba))[:, None] * len(COLOURS) + colours).ravel()
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    ids = np.zeros((1, session.get_inputs()[1].shape[1]), np.int64)
    features = []
    for start in range(0, len(combinations), batch):
        pixels = icons.images(combinations[start : start + batch]).astype(np.float32) / 127.5 - 1
        features.append(session.run(["image_embeds"], {"pixel_values": pixels, "input_ids": ids})[0])
    save_npz(
        path,
        features=np.concatenate(features).astype(np.float16),
        features_sha256=np.array(fingerprint(network)),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the icons part of the data folder.")
    parser.add_argument("--icons", type=Path, required=True, help="npz with rgba, caption and style")
    parser.add_argument(
        "--teacher", type=Path, help="folder of pretrain_text_to_image.py (default: keep the present one)"
    )
    parser.add_argument("--student", type=Path, help="stage folder of a compress run (default: keep the present one)")
    parser.add_argument(
        "--features", type=Path, help="folder of train_icon_features.py (default: keep the present one)"
    )
    parser.add_argument("--training", type=Path, metavar="FILE", help="npz to write all training images to")
    parser.add_argument("--out", type=Path, required=True, help="the data folder")
    args = parser.parse_args(argv)
    icons, folder = load_icons(args.icons), args.out / "icons"
    folder.mkdir(parents=True, exist_ok=True)

    if args.teacher is not None:
        save_teacher(args.teacher, folder / "teacher")
    if args.student is not None:
        save_student(args.student, folder / "student")
    network = folder / "features" / "model.onnx"
    if args.features is not None:
        (folder / "features").mkdir(exist_ok=True)
        for name in FEATURE_FILES:
            shutil.copyfile(args.features / name, folder / "features" / name)
    captions = icons.captions()
    drawn = np.random.default_rng(SEED).choice(icons.training(), min(CALIBRATION_IMAGES, len(icons.training())), False)
    save_captioned(icons, drawn, folder / "calibration.npz")
    if args.training is not None:
        save_captioned(icons, np.random.default_rng([SEED, 3]).permutation(icons.training()), args.training)
    texts = {
        "prompts.txt": [captions[one] for one in icons.held_out()],
        "captions.txt": one_caption_per_name(icons),
        "names.txt": sorted(set(icons.names.tolist())),
    }
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if network.is_file():
        save_reference(icons, network, folder / "reference.npz")
    write_manifest(args.out)


if __name__ == "__main__":
    main()
