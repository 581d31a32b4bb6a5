r"""Build the data folder that ships with the project, with a hash, a licence and a source for each file.

    teacher/         the default checkpoint as a complete diffusers pipeline, weights stored as float16
    student/         a small student of it as a diffpress checkpoint, weights stored as float16
    calibration.npz  a class-balanced draw of training images: x uint8 [N, 28, 28], y uint8 [N]
    reference.npz    held-out images in feature space: features [N, 64] for the kernel distance, mean m and
                     covariance S for the Frechet distance |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))
    MANIFEST.json    {path: {sha256, bytes, licence, source}} of every data file (data_manifest.py)

The folder must already contain `features.onnx`, the feature network written by train_features.py, and `prompts.txt`,
which no script generates. The same inputs give the same bytes on the same machine: archives have fixed time stamps.

    python examples/make_calib_data.py --teacher TEACHER --student STAGE --images TRAIN.npz --test TEST.npz \
        --out calib_data
"""

import argparse
import json
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
from data_manifest import fingerprint, write_json, write_manifest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

CALIBRATION_IMAGES = 2048
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIGS = ("unet/config.json", "scheduler/scheduler_config.json")

PLAN = {"solver": "dpmpp_2m", "steps": 20, "grid": "logsnr"}


def load_images(path: Path, labels: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Read `x` uint8 [N, H, W] or [N, H, W, C] and `y` [N], if present, from an npz file.

    Returns:
        x as uint8 [N, C, H, W], and y as int64 [N] or None.

    Raises:
        SystemExit: The file is not readable, has other arrays, or lacks the `labels` that were required.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            x = file["x"]
            y = file["y"].astype(np.int64) if "y" in file.files else None
    except (OSError, KeyError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path}: not an npz file with an image array `x`: {error}") from error
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or len(x) == 0:
        found = f"{x.dtype} {list(x.shape)}"
        raise SystemExit(f"{path}: x must be uint8 [N, H, W] or [N, H, W, C], found {found}")
    if labels and y is None:
        raise SystemExit(f"{path}: has no labels `y`, which this script needs")
    if y is not None and (y.shape != (len(x),) or y.min() < 0):
        raise SystemExit(f"{path}: y must be {len(x)} labels of 0 or more, found an array {list(y.shape)}")
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x), y


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    """Save arrays like np.savez_compressed, with fixed time stamps so that equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def save_half_precision(source: Path, out: Path) -> dict[str, dict]:
    """Copy a U-Net and its scheduler with float16 weights; return the two configs."""
    try:
        configs = {name: json.loads((source / name).read_text(encoding="utf-8")) for name in CONFIGS}
        weights = load_file(source / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        required = ", ".join((WEIGHTS, *CONFIGS))
        raise SystemExit(f"{source}: not a checkpoint with {required}: {error}") from error
    limit = np.finfo(np.float16).max
    for name, weight in weights.items():
        if np.abs(weight).max() > limit:
            raise SystemExit(f"{source / WEIGHTS}: {name} exceeds {limit}, the largest float16")
    for name, config in configs.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(out / name, config)
    # diffusers reads the "format" entry to determine the framework of the tensors.
    half_weights = {name: weight.astype(np.float16) for name, weight in weights.items()}
    save_file(half_weights, out / WEIGHTS, metadata={"format": "pt"})
    return configs


def save_student(source: Path, out: Path) -> None:
    """Copy a diffpress checkpoint with float16 weights: sampling plan, widths, history and the new hash."""
    from diffpress.compress.sources.load import load_checkpoint

    save_half_precision(source, out)
    try:
        description = json.loads((source / "diffpress.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{source}: not a diffpress checkpoint: {error}") from error
    write_json(out / "diffpress.json", description)
    write_json(out / "diffpress.json", description | {"hash": load_checkpoint(str(out)).hash})


def save_teacher(source: Path, out: Path) -> None:
    """Copy a U-Net and its scheduler into a pipeline folder with float16 weights."""
    configs = save_half_precision(source, out)
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": configs[CONFIGS[0]]["_diffusers_version"],
        "scheduler": ["diffusers", configs[CONFIGS[1]]["_class_name"]],
        "unet": ["diffusers", configs[CONFIGS[0]]["_class_name"]],
    }
    write_json(out / "model_index.json", index)
    # diffusers has no field for the null label of guidance, nor for the recommended sampling plan.
    classes = configs[CONFIGS[0]]["num_class_embeds"] - 1
    conditioning = {"kind": "class", "classes": classes, "null_label": classes}
    write_json(out / "diffpress.json", {"conditioning": conditioning, "plan": PLAN})


def balanced_draw(y: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return indices of `count` images in random order, with class counts that differ by at most one."""
    rng = np.random.default_rng(seed)
    classes = np.unique(y)
    per_class, extra = divmod(count, len(classes))
    larger = set(rng.choice(classes, extra, replace=False).tolist())
    picked = []
    for label in classes.tolist():
        (members,) = np.nonzero(y == label)
        needed = per_class + (label in larger)
        if len(members) < needed:
            raise SystemExit(f"class {label} has {len(members)} images, but {needed} are needed")
        picked.append(rng.choice(members, needed, replace=False))
    return rng.permutation(np.concatenate(picked))  # shuffled, so that a prefix is balanced as well


def extract(network: Path, x: np.ndarray, batch: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Compute features float32 [N, 64] and predicted labels int64 [N] of images uint8 [N, 1, 28, 28]."""
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    features, labels = [], []
    for start in range(0, len(x), batch):
        sample = x[start : start + batch].astype(np.float32) / 127.5 - 1.0
        feature, logits = session.run(["features", "logits"], {"sample": sample})
        features.append(feature)
        labels.append(logits.argmax(1))
    return np.concatenate(features), np.concatenate(labels)


def save_reference(network: Path, x: np.ndarray, y: np.ndarray, path: Path) -> float:
    """Write the statistics of real images in feature space and return the network's accuracy on them.

    The moments are computed from float32 features. The features themselves are stored as float16, which is precise
    enough for a kernel distance.
    """
    features, recognised = extract(network, x)
    save_npz(
        path,
        features=features.astype(np.float16),
        labels=y.astype(np.uint8),
        mean=features.mean(axis=0, dtype=np.float64),
        covariance=np.cov(features.astype(np.float64), rowvar=False, ddof=1),
        features_sha256=np.array(fingerprint(network)),
    )
    return float((recognised == y).mean())


def load_grey(path: Path) -> tuple[np.ndarray, np.ndarray]:
    x, y = load_images(path, labels=True)
    if x.shape[1:] != (1, 28, 28) or y.max() > 9:
        raise SystemExit(f"{path}: needs 28 x 28 grey images with labels 0..9, found {list(x.shape[1:])}")
    return x, y


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the data folder that ships with the project.")
    parser.add_argument("--teacher", type=Path, required=True, help="folder with unet/ and scheduler/")
    parser.add_argument(
        "--student", type=Path, required=True, help="stage folder of a compress run, such as stages/02-..."
    )
    parser.add_argument("--images", type=Path, required=True, help="npz with the training images")
    parser.add_argument("--test", type=Path, required=True, help="npz with the held-out images")
    parser.add_argument(
        "--out", type=Path, required=True, help="output folder, with features.onnx and prompts.txt in it"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration draw")
    args = parser.parse_args(argv)
    network = args.out / "features.onnx"
    if not network.is_file():
        raise SystemExit(f"{network} is missing: create it with examples/train_features.py first")
    if not (args.out / "prompts.txt").is_file():
        raise SystemExit(f"{args.out / 'prompts.txt'} is missing: copy it from calib_data, no script generates it")
    x, y = load_grey(args.images)
    test_x, test_y = load_grey(args.test)

    save_teacher(args.teacher, args.out / "teacher")
    save_student(args.student, args.out / "student")
    drawn = balanced_draw(y, CALIBRATION_IMAGES, args.seed)
    save_npz(args.out / "calibration.npz", x=x[drawn, 0], y=y[drawn].astype(np.uint8))
    accuracy = save_reference(network, test_x, test_y, args.out / "reference.npz")
    print(f"accuracy of features.onnx: {accuracy:.4f} on {len(test_x):,} held-out images")
    write_manifest(args.out)


if __name__ == "__main__":
    main()
