"""Conditioning: the inputs of a denoiser besides sample and timestep, as JSON-serializable data.

kind      inputs                     values
none
class     class_labels               one label per sample, or the null label
text      those named in `inputs`    prompts encoded by the bundle's text encoders (runtime/prompts.py)
tensors   those named in `tensors`   arrays of the caller: observations, a low-resolution image, an embedding

A network that is trained for inpainting reads `masked_image` as well, whatever its text inputs:

inpainting    channels of `masked_image`                                          of
mask          mask of the latent cells, latents of the masked image               Stable Diffusion, SDXL
pixel_mask    latents of the masked image, mask of the pixels of each cell        FLUX.1 Fill
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.json_fields import LARGEST, boolean, check_fields, convert_errors

CONDITIONINGS = ("none", "class", "text", "tensors")
TENSOR_DTYPES = ("float32", "int64")
MASKED_IMAGE = "masked_image"
INPAINTINGS = ("", "mask", "pixel_mask")
RESERVED_NAMES = ("sample", "timestep", "class_labels", "guidance")


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of the bundle and how its prompts are tokenized.

    Attributes:
        graph: Name of its graph in the bundle, such as `text_encoder_2`.
        tokenizer: Folder of its tokenizer in the bundle.
        length: Number of tokens; longer prompts are truncated, shorter ones are padded.
        pad: Token id used for padding.
        lower: Whether prompts are stripped and lower-cased first, for models trained on lower case only.
    """

    graph: str
    tokenizer: str
    length: int
    pad: int = 0
    lower: bool = False

    def __post_init__(self) -> None:
        if self.length < 1 or self.pad < 0:
            raise InvalidInputError(
                f"{self.graph}: {self.length} tokens padded with id {self.pad}; length must be at least 1 and pad not "
                "negative"
            )


@dataclass(frozen=True)
class TextInput:
    """One text input of the denoiser: the `shape` of one sample and the pieces it is assembled from.

    `rows` are concatenated along the sequence, the pieces of a row along the features; narrow rows are padded with
    zeros to `shape[-1]`. A piece is an encoder's output ('text_encoder.pooler_output'), its attention mask
    ('text_encoder.attention_mask'), 'size' (height and width of the image in pixels) or 'corner' (0, 0). An integer
    row stands for that many rows of zeros. An input without a sequence has exactly one row.
    """

    shape: tuple[int, ...]
    rows: tuple[tuple[str, ...] | int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the input holds sizes or a mask instead of features."""
        pieces = [piece for row in self.rows if not isinstance(row, int) for piece in row]
        return bool(pieces) and all(p in ("size", "corner") or p.endswith(".attention_mask") for p in pieces)


@dataclass(frozen=True)
class TensorInput:
    """One input of a denoiser that the caller supplies as an array.

    Attributes:
        shape: Shape of one sample's tensor; () for one number per sample.
        dtype: float32 or int64.
        null: Value of the unconditional half under guidance: a number that fills the tensor, or an array of `shape`
            (stored as a flat tuple). None if the input is the same in both halves.

    Examples:
        >>> import diffpress as dp
        >>> dp.TensorInput((2, 5), null=0.0)
        TensorInput(shape=(2, 5), dtype='float32', null=0.0)
    """

    shape: tuple[int, ...]
    dtype: str = TENSOR_DTYPES[0]
    null: Any = None

    def __post_init__(self) -> None:
        if self.dtype not in TENSOR_DTYPES:
            raise InvalidInputError(f"conditioning: dtype '{self.dtype}' is not one of {', '.join(TENSOR_DTYPES)}")
        if min(self.shape, default=1) < 1 or math.prod(self.shape) > LARGEST:
            raise InvalidInputError(f"conditioning: shape {tuple(self.shape)} has a size below 1 or is too large")
        object.__setattr__(self, "shape", tuple(int(side) for side in self.shape))
        if self.null is not None:
            object.__setattr__(self, "null", self._stored_null())

    def _stored_null(self) -> float | int | tuple[float | int, ...]:
        """Return `null` as a number or a flat tuple of numbers."""
        given = np.asarray(self.null)
        if given.dtype.kind not in "iuf" or (given.dtype.kind == "f" and self.dtype == "int64"):
            raise InvalidInputError(f"conditioning: null is {given.dtype}, the input is {self.dtype}")
        if given.size not in (1, math.prod(self.shape)) or not np.isfinite(given).all():
            raise InvalidInputError(
                f"conditioning: null has shape {given.shape}; give one finite number, or an array of shape {self.shape}"
            )
        stored = given.astype(self.dtype)
        return stored.item() if given.ndim == 0 else tuple(stored.ravel().tolist())

    @property
    def null_array(self) -> np.ndarray | None:
        """The null as an array of `shape`; None if there is none."""
        if self.null is None:
            return None
        values = np.asarray(self.null, self.dtype)
        return np.broadcast_to(values, self.shape) if values.size == 1 else values.reshape(self.shape)


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of a denoiser: none, a class label, text, or named tensors.

    Attributes:
        kind: One of CONDITIONINGS.
        classes: Number of classes.
        null_label: Label of the unconditional half under guidance, if the model has one.
        encoders: Text encoders that prompts go through.
        inputs: Text inputs of the denoiser by name.
        zero_negative: Without a negative prompt, use zeros instead of the encoded empty prompt (SDXL).
        guidance_input: The guidance weight is an input of the network, so that one evaluation suffices (LCM, Flux).
        tensors: Tensor inputs of the denoiser by name; the module is called with them as keyword arguments.
        inpainting: What a network for inpainting reads besides, one of INPAINTINGS; '' for other networks.

    Examples:
        >>> import diffpress as dp
        >>> dp.Conditioning("tensors", tensors={"observation": dp.TensorInput((2, 5))}).names
        ('observation',)
    """

    kind: str = "none"
    classes: int = 0
    null_label: int | None = None
    encoders: tuple[TextEncoder, ...] = ()
    inputs: Mapping[str, TextInput] = field(default_factory=dict)
    zero_negative: bool = False
    guidance_input: bool = False
    tensors: Mapping[str, TensorInput] = field(default_factory=dict)
    inpainting: str = ""

    def __post_init__(self) -> None:
        if self.kind not in CONDITIONINGS:
            raise InvalidInputError(f"conditioning kind '{self.kind}' is not one of {', '.join(CONDITIONINGS)}")
        if self.kind == "class" and not 1 <= self.classes <= LARGEST:
            raise InvalidInputError(f"class conditioning needs the number of classes (1 to {LARGEST})")
        if self.null_label is not None and not 0 <= self.null_label <= LARGEST:
            raise InvalidInputError(f"null label {self.null_label} is negative or above {LARGEST}")
        if (self.kind == "tensors") != bool(self.tensors):
            raise InvalidInputError(
                f"conditioning kind '{self.kind}' with {len(self.tensors)} tensors; kind 'tensors' needs at least one, "
                "as in Conditioning('tensors', tensors={'name': TensorInput(shape)}), and no other kind has any"
            )
        if self.inpainting not in INPAINTINGS or (self.inpainting and self.kind != "text"):
            raise InvalidInputError(
                f"conditioning: inpainting '{self.inpainting}' with kind '{self.kind}'; supported are "
                f"{', '.join(INPAINTINGS[1:])}, with kind 'text'"
            )
        for name in self.tensors:
            if not name.isidentifier() or name in RESERVED_NAMES:
                raise InvalidInputError(
                    f"conditioning: the tensor name '{name}' must be a Python name other than "
                    f"{', '.join(RESERVED_NAMES)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the conditioning inputs of the network, without the guidance weight."""
        if self.kind == "class":
            return ("class_labels",)
        return (*self.inputs, *self.tensors, *([MASKED_IMAGE] if self.inpainting else []))

    @property
    def has_null(self) -> bool:
        """Whether there is an unconditional half for guidance, without a prompt."""
        return self.null_label is not None or any(entry.null is not None for entry in self.tensors.values())


def conditioning_from_json(data: Any, where: str = "conditioning") -> Conditioning:
    """Read a conditioning from its JSON form.

    Raises:
        InvalidInputError: An entry is unknown or has the wrong type; the message starts with `where`.
    """
    raw = check_fields(Conditioning, data, where)
    with convert_errors(where):
        label = raw.get("null_label")
        return Conditioning(
            kind=str(raw.get("kind", "none")),
            classes=int(raw.get("classes", 0)),
            null_label=None if label is None else int(label),
            encoders=tuple(TextEncoder(**check_fields(TextEncoder, entry, where)) for entry in raw.get("encoders", ())),
            inputs={str(name): _text_input(entry, where) for name, entry in raw.get("inputs", {}).items()},
            zero_negative=boolean(raw.get("zero_negative", False)),
            guidance_input=boolean(raw.get("guidance_input", False)),
            tensors={str(name): _tensor_input(entry, where) for name, entry in raw.get("tensors", {}).items()},
            inpainting=str(raw.get("inpainting", "")),
        )


def _text_input(data: Any, where: str) -> TextInput:
    raw = check_fields(TextInput, data, where)
    rows = tuple(row if isinstance(row, int) else tuple(str(piece) for piece in row) for row in raw["rows"])
    return TextInput(tuple(int(side) for side in raw["shape"]), rows)


def _tensor_input(data: Any, where: str) -> TensorInput:
    raw = check_fields(TensorInput, data, where)
    return TensorInput(tuple(int(side) for side in raw["shape"]), str(raw["dtype"]), raw.get("null"))
