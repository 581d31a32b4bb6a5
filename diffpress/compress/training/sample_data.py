"""Samples for training and calibration with their conditioning, read from a .npz or .npy file.

    x, y            uint8 images [N, H, W] or [N, H, W, C], and the class labels [N] of class-conditional models
    samples         float [N, *sample_shape] in the data range; also under the name `images`, or alone in a .npy file
    a tensor's name [N, ...], for models that are conditioned on tensors, with either of the above

Models of latents take float samples only: images would have to be encoded first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.arrays import read_npy, read_npz
from diffpress.runtime.network_inputs import LABELS, ConditioningInputs, dummy_conditioning, tensor_conditioning
from diffpress.runtime.spec import DenoiserSpec

SAMPLES = ("samples", "images")
IMAGES, CLASSES = "x", "y"
RANGE_TOLERANCE = 1e-3  # of the width of the data range

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampleData:
    """Samples as stored; uint8 images are scaled to the data range batch by batch.

    Attributes:
        x: Samples [N, *sample_shape]: float32 in the data range, or uint8.
        labels: Classes int64 [N], or None.
        hash: Hash of the file.
        spec: Spec of the model that the samples are for.
        tensors: Conditioning [N, ...] by name, for models conditioned on tensors.
        prompts: Empty: models conditioned on text learn from captioned images or from their own samples.
    """

    x: np.ndarray
    labels: np.ndarray | None
    hash: str
    spec: DenoiserSpec
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, Tensors]:
        """Draw random samples, float32 [B, ...] in the data range, and their conditioning [B, ...] by name."""
        picks = torch.randint(0, len(self.x), (size,), generator=generator).numpy()
        low, high = self.spec.data_range
        x = torch.from_numpy(self.x[picks].astype(np.float32))
        if self.x.dtype == np.uint8:
            x = x * ((high - low) / 255.0) + low
        labels = {} if self.labels is None else {LABELS: torch.from_numpy(self.labels[picks])}
        return x, labels | {name: torch.from_numpy(array[picks]) for name, array in self.tensors.items()}

    @property
    def uncond(self) -> Tensors:
        """The unconditional inputs, [1, ...] by name; empty if there are none."""
        label = self.spec.conditioning.null_label
        if self.labels is not None and label is not None:
            return {LABELS: torch.tensor([label])}
        nulls = {name: entry.null_array for name, entry in self.spec.conditioning.tensors.items()}
        return {name: torch.from_numpy(null[None].copy()) for name, null in nulls.items() if null is not None}

    def conditions(self, count: int) -> ConditioningInputs:
        """Return the conditioning of `count` samples: the stored tensors in turn, the classes in turn, or none."""
        if not self.tensors:
            return dummy_conditioning(self.spec, count)
        rows = np.arange(count) % len(self.x)
        return tensor_conditioning(self.spec, count, {name: array[rows] for name, array in self.tensors.items()})


def load_samples(path: Path, spec: DenoiserSpec) -> SampleData:
    """Load the samples of a file for a model.

    Raises:
        InvalidInputError: The file is unreadable, or its samples or their conditioning do not fit the spec.
    """
    arrays = {SAMPLES[0]: read_npy(path)} if path.suffix == ".npy" else read_npz(path)
    found = [name for name in (IMAGES, *SAMPLES) if name in arrays and name not in spec.conditioning.tensors]
    if len(found) != 1:
        raise InvalidInputError(
            f"{path}: has the arrays {', '.join(arrays) or 'none'}; expected either '{IMAGES}' (uint8 images [N, H, W] "
            f"or [N, H, W, C]) or '{SAMPLES[0]}' (float [N, {', '.join(map(str, spec.sample_shape))}])"
        )
    x = _samples(path, found[0], arrays.pop(found[0]), spec)
    labels = _labels(path, arrays.get(CLASSES), len(x), spec) if spec.conditioning.kind == "class" else None
    tensors = _tensors(path, arrays, len(x), spec)
    return SampleData(x, labels, hashlib.sha256(path.read_bytes()).hexdigest(), spec, tensors)


def read_images(path: Path) -> np.ndarray:
    """Read the uint8 images of an npz file as [N, C, H, W]; InvalidInputError if it is unreadable or has none."""
    arrays = read_npz(path)
    if IMAGES not in arrays:
        raise InvalidInputError(f"{path}: no array '{IMAGES}'; expected uint8 images [N, H, W] or [N, H, W, C]")
    return channels_first(path, arrays[IMAGES])


def channels_first(path: Path, x: np.ndarray) -> np.ndarray:
    """Return uint8 images [N, H, W] or [N, H, W, C] as [N, C, H, W]; InvalidInputError for anything else."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise InvalidInputError(
            f"{path}: '{IMAGES}' is {x.dtype} {list(x.shape)}; expected uint8 [N, H, W] or [N, H, W, C]"
        )
    if len(x) == 0:
        raise InvalidInputError(f"{path}: contains no images")
    return np.ascontiguousarray(x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2))


def _samples(path: Path, name: str, x: np.ndarray, spec: DenoiserSpec) -> np.ndarray:
    if name == IMAGES or x.dtype == np.uint8:
        if not spec.is_pixel_space:
            raise InvalidInputError(
                f"{path}: holds images, but the model samples latents {list(spec.sample_shape)}; it learns from "
                f"samples of its teacher without 'data', or from latents as a float array '{SAMPLES[0]}'"
            )
        x = channels_first(path, x)
        if x.shape[1:] != spec.sample_shape:
            raise InvalidInputError(
                f"{path}: images are {list(x.shape[1:])}, the model expects {list(spec.sample_shape)}"
            )
        return x
    if x.dtype.kind != "f" or x.ndim == 0 or x.shape[1:] != spec.sample_shape or len(x) == 0:
        raise InvalidInputError(
            f"{path}: '{name}' is {x.dtype} {list(x.shape)}, the model expects float [N, "
            f"{', '.join(map(str, spec.sample_shape))}] with at least one sample"
        )
    if not np.isfinite(x).all():
        raise InvalidInputError(f"{path}: '{name}' contains NaN or infinite values")
    _check_range(path, name, x, spec)
    return x.astype(np.float32, copy=False)


def _check_range(path: Path, name: str, x: np.ndarray, spec: DenoiserSpec) -> None:
    """Refuse samples that the model's plan would clip."""
    (low, high), least, most = spec.data_range, float(x.min()), float(x.max())
    margin = RANGE_TOLERANCE * (high - low)
    if spec.plan.clip and (least < low - margin or most > high + margin):
        raise InvalidInputError(
            f"{path}: '{name}' has values from {least:g} to {most:g}, but the model's data range is {low:g} to "
            f"{high:g} and its plan clips to it; scale the samples, or set data_range or clip=False in the spec"
        )


def _labels(path: Path, labels: np.ndarray | None, count: int, spec: DenoiserSpec) -> np.ndarray:
    """Return the labels of a class-conditional model, int64 [N]."""
    if labels is None:
        raise InvalidInputError(f"{path}: no labels '{CLASSES}', but the model is class-conditional")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise InvalidInputError(
            f"{path}: '{CLASSES}' is {labels.dtype} {list(labels.shape)}, expected integers [{count}]"
        )
    if labels.min() < 0 or labels.max() >= spec.conditioning.classes:
        raise InvalidInputError(
            f"{path}: labels reach {labels.max()}, the model has {spec.conditioning.classes} classes"
        )
    return labels.astype(np.int64)


def _tensors(path: Path, arrays: dict[str, np.ndarray], count: int, spec: DenoiserSpec) -> dict[str, np.ndarray]:
    expected = spec.conditioning.tensors
    missing = [name for name in expected if name not in arrays]
    if missing:
        raise InvalidInputError(f"{path}: no array '{missing[0]}', but the model is conditioned on it")
    for name in expected:
        if arrays[name].shape[:1] != (count,):
            found = arrays[name].shape[0] if arrays[name].ndim else "no"
            raise InvalidInputError(f"{path}: '{name}' has {found} rows for {count} samples")
    try:
        cond = tensor_conditioning(spec, count, {name: arrays[name] for name in expected}).cond
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error
    return dict(cond)
