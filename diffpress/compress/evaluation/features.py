"""Feature networks for scoring images, and reference features of real images."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.compress.evaluation.metrics import kernel_within
from diffpress.compress.training.image_data import read_npz
from diffpress.runtime.bundle import sha256
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec


@dataclass(frozen=True)
class Reference:
    """Features [M, D] of real images; `source` records their file, its hash and the number of images."""

    features: np.ndarray
    source: dict[str, Any]

    @cached_property
    def kernel_within(self) -> float:
        """Term of the KID that depends only on the reference."""
        return kernel_within(self.features)


@dataclass(frozen=True)
class FeatureNetwork:
    """Feature network: `run(images float32 [N, C, H, W])` returns features [N, D] and logits [N, classes]."""

    name: str
    sha256: str
    run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def load_features(path: Path, spec: DenoiserSpec, threads: int | None = None) -> FeatureNetwork:
    """Load an ONNX feature network and check that it accepts the model's samples.

    Raises:
        InvalidInputError: The file is not readable, the model works in latent space, or the shapes differ.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's error types are private
        raise InvalidInputError(f"{path}: not readable as a feature network ({str(error).splitlines()[0]})") from error
    if not spec.is_pixel_space:
        raise InvalidInputError(
            "evaluate supports only pixel-space models; for a latent model, sample the bundle and score the images "
            "with another tool"
        )
    shape = tuple(session.get_inputs()[0].shape[1:])
    if shape != tuple(spec.sample_shape):
        raise InvalidInputError(
            f"{path}: this feature network expects images {list(shape)}, the model samples {list(spec.sample_shape)}; "
            "pass a matching one with --features NET.onnx (input 'sample', outputs 'features' and 'logits')"
        )

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features, logits = session.run(["features", "logits"], {"sample": images})
        return features, logits

    return FeatureNetwork(path.name, sha256(path), run)


def load_reference(path: Path, network: FeatureNetwork, spec: DenoiserSpec) -> Reference:
    """Load reference features from an npz file, or compute them from its images.

    Raises:
        InvalidInputError: The file is not readable, its features come from another network, or the shapes differ.
    """
    try:
        # numpy leaves a damaged archive open, so the file is opened here
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidInputError(f"{path}: not readable as npz ({error})") from error
    if "features" in stored:
        if str(stored.get("features_sha256")) != network.sha256:
            raise InvalidInputError(
                f"{path}: its features were computed by a network other than {network.name}; pass images instead"
            )
        features = stored["features"].astype(np.float64)
    else:
        images, _ = read_npz(path)
        if images.shape[1:] != tuple(spec.sample_shape):
            raise InvalidInputError(
                f"{path}: images are {list(images.shape[1:])}, the model samples {list(spec.sample_shape)}"
            )
        low, high = spec.data_range
        scaled = [
            images[i : i + 256].astype(np.float32) * ((high - low) / 255.0) + low for i in range(0, len(images), 256)
        ]
        features = np.concatenate([network.run(batch)[0] for batch in scaled]).astype(np.float64)
    return Reference(features, {"file": path.name, "sha256": sha256(path), "images": len(features)})
