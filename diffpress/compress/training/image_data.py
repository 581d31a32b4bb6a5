"""Images for calibration and training, read from an npz file.

The file has `x`, uint8 [N, H, W] or [N, H, W, C], and optionally labels `y` [N].
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs, dummy_conditioning
from diffpress.runtime.spec import DenoiserSpec


@dataclass(frozen=True)
class ImageData:
    """Images as stored, scaled to the data range batch by batch.

    Attributes:
        x: uint8 [N, C, H, W].
        labels: int64 [N], or None.
        hash: Hash of the file.
        spec: Spec of the model that the images are for.
    """

    x: np.ndarray
    labels: np.ndarray | None
    hash: str
    spec: DenoiserSpec

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Draw random images, float32 [B, C, H, W] in the data range, and their class_labels int64 [B]."""
        picks = torch.randint(0, len(self.x), (size,), generator=generator).numpy()
        low, high = self.spec.data_range
        x = torch.from_numpy(self.x[picks].astype(np.float32)) * ((high - low) / 255.0) + low
        return x, {} if self.labels is None else {"class_labels": torch.from_numpy(self.labels[picks])}

    @property
    def uncond(self) -> dict[str, torch.Tensor]:
        """The null label, int64 [1], by input name; empty without labels or without a null label."""
        label = self.spec.conditioning.null_label
        return {} if self.labels is None or label is None else {"class_labels": torch.tensor([label])}

    def conditions(self, count: int) -> ConditioningInputs:
        """Return the conditioning of `count` samples: the classes in turn, or none."""
        return dummy_conditioning(self.spec, count)


def load_images(path: Path, spec: DenoiserSpec) -> ImageData:
    """Load the images of an npz file for a model.

    Raises:
        InvalidInputError: The file is unreadable, or its images or labels do not fit the spec.
    """
    x, labels = read_npz(path)
    if x.shape[1:] != tuple(spec.sample_shape):
        raise InvalidInputError(f"{path}: images are {list(x.shape[1:])}, the model expects {list(spec.sample_shape)}")
    if spec.conditioning.kind == "class":
        if labels is None:
            raise InvalidInputError(f"{path}: no labels 'y', but the model is class-conditional")
        if labels.min() < 0 or labels.max() >= spec.conditioning.classes:
            raise InvalidInputError(
                f"{path}: labels reach {labels.max()}, the model has {spec.conditioning.classes} classes"
            )
    else:
        labels = None
    return ImageData(x, labels, hashlib.sha256(path.read_bytes()).hexdigest(), spec)


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read images, uint8 [N, C, H, W], and labels, int64 [N] or None.

    Raises:
        InvalidInputError: The file is unreadable, or its arrays have the wrong shape or dtype.
    """
    try:
        # numpy leaves a damaged archive open, so the file is opened here
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if "x" not in file:
                raise InvalidInputError(f"{path}: no array 'x'; expected uint8 images [N, H, W] or [N, H, W, C]")
            x, labels = file["x"], file["y"].astype(np.int64) if "y" in file else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InvalidInputError(f"{path}: not readable as an npz file of images ({error})") from error
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise InvalidInputError(f"{path}: 'x' is {x.dtype} {list(x.shape)}; expected uint8 [N, H, W] or [N, H, W, C]")
    if len(x) == 0:
        raise InvalidInputError(f"{path}: contains no images")
    if labels is not None and labels.shape != (len(x),):
        raise InvalidInputError(f"{path}: 'y' has shape {list(labels.shape)}, expected [{len(x)}]")
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x), labels
