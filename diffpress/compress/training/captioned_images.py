"""Captioned images as training data of text-to-image models, read from an npz file.

    x, caption      uint8 images [N, H, W, 3] of the model's image size, and the caption of each, str [N]

Models of latents learn from the means of what the pipeline's own autoencoder encodes the images to. They are computed
once and kept in the run's folder; a batch reads its rows from there. Captions are encoded batch by batch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.components import Component, encode_images, encode_prompts, load_component
from diffpress.compress.models.components import prompt_conditions as conditions_of
from diffpress.compress.progress import progress
from diffpress.compress.training.sample_data import IMAGES, channels_first
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.arrays import memory_map, read_npz
from diffpress.runtime.io.files import atomic
from diffpress.runtime.network_inputs import ConditioningInputs

CAPTIONS = "caption"
ENCODED_TOGETHER = 8

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions; see the module docstring.

    Attributes:
        teacher: The checkpoint whose autoencoder and text encoders encode them.
        images: uint8 [N, 3, H, W].
        prompts: The caption of each.
        file_hash: Hash of their file.
        folder: Folder of the encoded images.
    """

    teacher: Checkpoint
    images: np.ndarray
    prompts: tuple[str, ...]
    file_hash: str
    folder: Path

    @property
    def hash(self) -> str:
        """Hash of the file; the teacher's weights enter a stage's key by themselves."""
        return self.file_hash

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, Tensors]:
        """Draw random samples, float32 [B, ...], and their conditioning [B, ...] by name."""
        rows = torch.randint(0, len(self.images), (size,), generator=generator).numpy()
        cond = encode_prompts(self.teacher, [self.prompts[row] for row in rows], self._text_encoders)
        return torch.from_numpy(self._samples[rows]), {name: torch.from_numpy(array) for name, array in cond.items()}

    @cached_property
    def uncond(self) -> Tensors:
        """The unconditional inputs, [1, ...] by name."""
        uncond = encode_prompts(self.teacher, None, self._text_encoders)
        return {name: torch.from_numpy(array) for name, array in uncond.items()}

    def conditions(self, count: int) -> ConditioningInputs:
        """Return the conditioning of `count` samples: the captions in turn."""
        captions = [self.prompts[i % len(self.prompts)] for i in range(count)]
        return conditions_of(self.teacher, captions, self._text_encoders)

    @cached_property
    def _text_encoders(self) -> dict[str, Component]:
        names = [encoder.graph for encoder in self.teacher.spec.conditioning.encoders]
        return {name: load_component(self.teacher, name) for name in names}

    @cached_property
    def _samples(self) -> np.ndarray:
        """What the model learns to denoise, float32 [N, ...], memory-mapped."""
        facts = json.dumps([self.file_hash, self.teacher.hash])
        path = self.folder / f"images-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.npy"
        if not path.is_file():
            parts = []
            with progress("encoding the images", len(self.images)) as advance:
                for part in encode_images(self.teacher, self.images, ENCODED_TOGETHER):
                    parts.append(part)
                    advance(sum(map(len, parts)))
            with atomic(path, "free disk space and run again") as temporary, temporary.open("wb") as file:
                np.save(file, np.concatenate(parts), allow_pickle=False)
        return memory_map(path)


def load_captioned_images(path: Path, teacher: Checkpoint, folder: Path) -> CaptionedImages:
    """Load captioned images for a text-to-image model.

    Raises:
        InvalidInputError: The file is unreadable, or its images or captions do not fit the model.
    """
    arrays, spec = read_npz(path), teacher.spec
    if IMAGES not in arrays:
        raise InvalidInputError(f"{path}: no array '{IMAGES}'; expected uint8 images [N, H, W, 3] and '{CAPTIONS}' [N]")
    images = channels_first(path, arrays[IMAGES])
    expected = spec.sample_shape if spec.is_pixel_space else (3, *spec.image_size)
    if images.shape[1:] != tuple(expected):
        raise InvalidInputError(f"{path}: images are {list(images.shape[1:])}, the model expects {list(expected)}")
    captions = read_captions(path, arrays)
    if len(captions) != len(images):
        raise InvalidInputError(f"{path}: {len(captions)} captions for {len(images)} images")
    return CaptionedImages(teacher, images, captions, hashlib.sha256(path.read_bytes()).hexdigest(), folder)


def read_captions(path: Path, arrays: dict[str, np.ndarray] | None = None) -> tuple[str, ...]:
    """Return the captions in an npz file, whose arrays may have been read before.

    Raises:
        InvalidInputError: It has none.
    """
    captions = (read_npz(path) if arrays is None else arrays).get(CAPTIONS)
    if captions is None or captions.dtype.kind != "U" or captions.ndim != 1 or len(captions) == 0:
        found = "missing" if captions is None else f"{captions.dtype} {list(captions.shape)}"
        raise InvalidInputError(f"{path}: '{CAPTIONS}' is {found}; expected the caption of each image, str [N]")
    return tuple(captions.tolist())
