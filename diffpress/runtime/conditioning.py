"""Conditioning: what a denoiser is told besides the noisy sample, as plain data that travels as JSON.

Each kind adds inputs to the two that every denoiser has, the sample and the timestep:

    none
    class    class_labels               a label for each sample, or the null label
    text     whatever `inputs` names    prompts, through the bundle's text encoders (runtime/prompts.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.json_fields import LARGEST, boolean, known, reading

CONDITIONINGS = ("none", "class", "text")


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder: its graph's name in the bundle (`text_encoder_2`), the folder of its tokenizer, and how
    prompts become ids: `length` tokens, cut or filled with `pad`; `lower` for models taught lower case only.
    """

    graph: str
    tokenizer: str
    length: int
    pad: int = 0
    lower: bool = False

    def __post_init__(self) -> None:
        if self.length < 1 or self.pad < 0:
            raise InvalidInputError(f"{self.graph}: {self.length} tokens filled with {self.pad} make no sense")


@dataclass(frozen=True)
class TextInput:
    """One input of the denoiser that is made of encoded text: `shape` of one sample, and where it comes from.

    `rows` follow each other along the sequence, the pieces of a row lie side by side along the features, and
    narrow rows are filled with zeros up to `shape[-1]`. A piece is an encoder's output ('text_encoder.pooler_output',
    'text_encoder.attention_mask'), 'size' (height and width of the image in pixels) or 'corner' (0, 0); a row that is
    a number stands for that many rows of zeros. An input without a sequence has one row.
    """

    shape: tuple[int, ...]
    rows: tuple[tuple[str, ...] | int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it holds sizes or a mask instead of features."""
        pieces = [piece for row in self.rows if not isinstance(row, int) for piece in row]
        return bool(pieces) and all(p in ("size", "corner") or p.endswith(".attention_mask") for p in pieces)


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told besides the noisy sample: nothing, a class label, or text.

    `zero_negative`: no negative prompt means inputs of zeros, instead of the encoding of the empty text (SDXL).
    `guidance_input`: the guidance weight is an input of the network, and one call does for two (LCM, Flux).
    """

    kind: str = "none"
    classes: int = 0
    null_label: int | None = None
    encoders: tuple[TextEncoder, ...] = ()
    inputs: Mapping[str, TextInput] = field(default_factory=dict)
    zero_negative: bool = False
    guidance_input: bool = False

    def __post_init__(self) -> None:
        if self.kind not in CONDITIONINGS:
            raise InvalidInputError(f"conditioning kind '{self.kind}' is not one of {', '.join(CONDITIONINGS)}")
        if self.kind == "class" and not 1 <= self.classes <= LARGEST:
            raise InvalidInputError(f"class conditioning needs the number of classes (1 to {LARGEST})")
        if self.null_label is not None and not 0 <= self.null_label <= LARGEST:
            raise InvalidInputError(f"null label {self.null_label} is negative or above {LARGEST}")


def conditioning_from_json(data: Any, where: str = "conditioning") -> Conditioning:
    """Read a conditioning back; anything unknown or of the wrong type raises InvalidInputError naming `where`."""
    raw = known(Conditioning, data, where)
    with reading(where):
        null = raw.get("null_label")
        return Conditioning(
            kind=str(raw.get("kind", "none")),
            classes=int(raw.get("classes", 0)),
            null_label=None if null is None else int(null),
            encoders=tuple(TextEncoder(**known(TextEncoder, entry, where)) for entry in raw.get("encoders", ())),
            inputs={str(name): _text_input(entry, where) for name, entry in raw.get("inputs", {}).items()},
            zero_negative=boolean(raw.get("zero_negative", False)),
            guidance_input=boolean(raw.get("guidance_input", False)),
        )


def _text_input(data: Any, where: str) -> TextInput:
    raw = known(TextInput, data, where)
    rows = tuple(row if isinstance(row, int) else tuple(str(piece) for piece in row) for row in raw["rows"])
    return TextInput(tuple(int(side) for side in raw["shape"]), rows)
