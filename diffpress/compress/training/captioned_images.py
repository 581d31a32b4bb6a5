"""Captioned images as training data of text-to-image models, read from an npz file.

    x, caption      uint8 images [N, H, W, 3] of the model's image size, and the caption of each, str [N]

The pipeline's own autoencoder encodes the images, once: the samples are kept in the run's folder, and a batch reads its
rows from there. Captions are encoded batch by batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.components import Component, load_component, prompt_conditions, prompt_encoder
from diffpress.compress.models.latent_encoder import encode_images, encoding_autoencoder
from diffpress.compress.progress import progress
from diffpress.compress.sources.weights import weight_files
from diffpress.compress.training.sample_data import IMAGES, channels_first
from diffpress.runtime.bundle import sha256
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.arrays import memory_map, read_npz
from diffpress.runtime.io.files import atomic
from diffpress.runtime.network_inputs import ConditioningInputs

CAPTIONS = "caption"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions; see the module docstring.

    Attributes:
        teacher: The checkpoint whose autoencoder and text encoders encode them.
        images: uint8 [N, 3, H, W].
        prompts: The caption of each.
        hash: Hash of their file.
        folder: Folder of the encoded images.
    """

    teacher: Checkpoint
    images: np.ndarray
    prompts: tuple[str, ...]
    hash: str
    folder: Path

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, Tensors]:
        """Draw random samples, float32 [B, ...], and their conditioning [B, ...] by name."""
        rows = torch.randint(0, len(self.images), (size,), generator=generator).numpy()
        return torch.from_numpy(self._samples[rows]), self._encoded([self.prompts[row] for row in rows])

    @cached_property
    def uncond(self) -> Tensors:
        """The unconditional inputs, [1, ...] by name."""
        return self._encoded(None)

    def conditions(self, count: int) -> ConditioningInputs:
        """Return the conditioning of `count` samples: the captions in turn."""
        captions = [self.prompts[i % len(self.prompts)] for i in range(count)]
        return prompt_conditions(self.teacher, captions, self._text_encoders)

    def _encoded(self, captions: Sequence[str] | None) -> Tensors:
        return {name: torch.from_numpy(array) for name, array in self._encode(captions).items()}

    @cached_property
    def _encode(self) -> Callable[[Sequence[str] | None], dict[str, np.ndarray]]:
        return prompt_encoder(self.teacher, self._text_encoders)

    @cached_property
    def _text_encoders(self) -> dict[str, Component]:
        names = [encoder.graph for encoder in self.teacher.spec.conditioning.encoders]
        return {name: load_component(self.teacher, name) for name in names}

    @cached_property
    def _samples(self) -> np.ndarray:
        """The encoded images, float32 [N, ...], memory-mapped."""
        weights = [sha256(file) for file in weight_files(encoding_autoencoder(self.teacher).folder)]
        facts = json.dumps([self.hash, self.teacher.hash, weights])
        path = self.folder / f"images-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.npy"
        if not path.is_file():
            shape = (len(self.images), *self.teacher.spec.sample_shape)
            with (
                atomic(path, "free disk space and run again") as temporary,
                temporary.open("wb") as file,
                progress("encoding the images", len(self.images)) as advance,
            ):
                # not through a memory map, where a full disk ends the process
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                done = 0
                for part in encode_images(self.teacher, self.images):
                    file.write(np.ascontiguousarray(part, "<f4").tobytes())
                    done += len(part)
                    advance(done)
        return memory_map(path)


def has_captions(file: Path) -> bool:
    """Return whether a text-to-image model's `data` is captioned images; any other file holds prompts."""
    return file.suffix == ".npz"


def load_captioned_images(path: Path, teacher: Checkpoint, folder: Path) -> CaptionedImages:
    """Load captioned images for a text-to-image model.

    Raises:
        InvalidInputError: The file is unreadable, its images or captions do not fit the model, or the model cannot
            encode them.
    """
    if not teacher.spec.conditioning.encoders:
        raise InvalidInputError(f"{path}: the model came without its text encoders; load the whole pipeline's folder")
    encoding_autoencoder(teacher)
    arrays, size = read_npz(path), teacher.spec.image_size
    if IMAGES not in arrays:
        raise InvalidInputError(f"{path}: no array '{IMAGES}'; expected uint8 images [N, H, W, 3] and '{CAPTIONS}' [N]")
    images = channels_first(path, arrays[IMAGES])
    if images.shape[1:] != (3, *size):
        raise InvalidInputError(f"{path}: images are {list(images.shape[1:])}, the model expects {[3, *size]}")
    captions = _captions(path, arrays)
    if len(captions) != len(images):
        raise InvalidInputError(f"{path}: {len(captions)} captions for {len(images)} images")
    return CaptionedImages(teacher, images, captions, sha256(path), folder)


def read_captions(path: Path) -> tuple[str, ...]:
    """Return the captions in an npz file; InvalidInputError if it has none."""
    return _captions(path, read_npz(path, [CAPTIONS]))


def _captions(path: Path, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    captions = arrays.get(CAPTIONS)
    if captions is None or captions.dtype.kind != "U" or captions.ndim != 1 or len(captions) == 0:
        found = "missing" if captions is None else f"{captions.dtype} {list(captions.shape)}"
        raise InvalidInputError(f"{path}: '{CAPTIONS}' is {found}; expected the caption of each image, str [N]")
    return tuple(captions.tolist())
