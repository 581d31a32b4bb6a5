"""From prompts to the denoiser's text inputs: tokenize, encode, assemble.

    prompt --tokenizer--> ids, mask [N, L] --text encoder--> hidden states [N, L, D], pooled [N, D] --rows--> inputs

Which encoders there are and how their outputs are laid side by side is data (diffpress.runtime.conditioning.Conditioning), so one
assembly serves them all; with | side by side along the features, and / below each other along the sequence:

    SD 1.x, PixArt   encoder_hidden_states = hidden
    SDXL             encoder_hidden_states = hidden_1 | hidden_2,          time_ids = size | corner | size
    SD3              encoder_hidden_states = (hidden_1 | hidden_2 | 0) / hidden_3
    Flux             txt_ids = L rows of zeros

Tokenizers are files of the `tokenizers` library (tokenizer.json), which the extra `text` brings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError, unknown_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IDS, MASK = "input_ids", "attention_mask"
SIZE, CORNER = "size", "corner"
BATCH = 8  # prompts that go through an encoder at once: bounds the memory of its activations

Warn = Callable[[str], None]


class TextNetwork(Protocol):
    """What encoding needs of a text encoder; engines have it, and so has a thin wrapper of a torch module."""

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """The graph's inputs and their types: `input_ids`, and `attention_mask` where it takes one."""

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, each [N, ...], for one batch of ids [N, L]."""


class Tokens(NamedTuple):
    """Prompts as an encoder takes them, and what of each prompt was left out."""

    ids: np.ndarray  # int64 [N, L]
    mask: np.ndarray  # int64 [N, L]: 1 for a token of the prompt, special ones included, 0 for filling
    unread: tuple[str, ...]  # N texts, empty where the whole prompt fits


def open_tokenizer(file: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`; raises InvalidInputError for a file that is none, MissingDependencyError without the library."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingDependencyError("tokenizers", "text", "reading prompts") from error
    if not Path(file).is_file():
        raise InvalidInputError(f"{file}: no such file")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise InvalidInputError(f"{file}: not a tokenizer.json of the tokenizers library ({error})") from error


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], encoder: TextEncoder) -> Tokens:
    """Ids of exactly `encoder.length` tokens a prompt: cut before the closing special token, or filled with `pad`.

    The same as transformers' `padding="max_length", truncation=True`; `encoder.lower` first does what PixArt does
    to prompts (diffusers, `_text_preprocessing` without `clean_caption`). Raises InvalidInputError where not even the
    special tokens fit. Sets the tokenizer's own truncation and padding, which a file may carry from training.
    """
    fewest = tokenizer.num_special_tokens_to_add(False)
    if encoder.length < fewest:
        raise InvalidInputError(
            f"{encoder.graph}: {encoder.length} tokens, but its tokenizer alone adds {fewest} special ones"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(encoder.length)
    ids = np.full((len(prompts), encoder.length), encoder.pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    unread = []
    for row, prompt in enumerate(prompts):
        text = prompt.lower().strip() if encoder.lower else prompt
        encoding = tokenizer.encode(text)
        ids[row, : len(encoding.ids)] = encoding.ids
        mask[row, : len(encoding.ids)] = 1
        # the overflow has special tokens of its own, which stand nowhere in the text
        lost = (
            at[0]
            for part in encoding.overflowing
            for at, special in zip(part.offsets, part.special_tokens_mask, strict=True)
            if not special
        )
        unread.append(text[next(lost, len(text)) :].strip())
    return Tokens(ids, mask, tuple(unread))


def encode(
    prompts: Sequence[str],
    conditioning: Conditioning,
    encoders: Mapping[str, TextNetwork],
    tokenizers: Mapping[str, Tokenizer],
    size: tuple[int, int],
    warn: Warn = warnings.warn,
) -> dict[str, np.ndarray]:
    """The denoiser's text inputs for these prompts: `{name: float32 [N, *shape]}`.

    `encoders` go by graph (`TextEncoder.graph`), `tokenizers` by folder (`TextEncoder.tokenizer`); `size` is the
    image's (height, width) in pixels. Equal prompts are encoded once. `warn` gets one line for each prompt that is
    too long, with the words that were left out. Raises InvalidInputError as `tokenize` and `assemble` do.
    """
    unique = list(dict.fromkeys(prompts))
    place = {prompt: index for index, prompt in enumerate(unique)}
    index = np.array([place[prompt] for prompt in prompts], dtype=np.int64)
    tokens = {it.graph: tokenize(tokenizers[it.tokenizer], unique, it) for it in conditioning.encoders}
    _warn_of_cuts(unique, conditioning.encoders, tokens, warn)

    result = {name: np.empty((len(prompts), *form.shape), np.float32) for name, form in conditioning.inputs.items()}
    for start in range(0, len(unique), BATCH):
        batch = slice(start, min(start + BATCH, len(unique)))
        outputs: dict[str, np.ndarray] = {}
        for graph, (ids, mask, _) in tokens.items():
            outputs |= _run(graph, encoders[graph], ids[batch], mask[batch])
        members = (index >= batch.start) & (index < batch.stop)
        for name, array in assemble(conditioning, outputs, batch.stop - batch.start, size).items():
            result[name][members] = array[index[members] - start]
    return result


def unconditional(
    negatives: Sequence[str] | None,
    count: int,
    conditioning: Conditioning,
    encoders: Mapping[str, TextNetwork],
    tokenizers: Mapping[str, Tokenizer],
    size: tuple[int, int],
    warn: Warn = warnings.warn,
) -> dict[str, np.ndarray]:
    """The text inputs of guidance's null half for `count` samples, as `encode` gives them for the other half.

    Negative prompts are encoded like any. Without them it is the empty prompt, or, with `zero_negative`, zeros and
    no encoder runs (diffusers, SDXL's `force_zeros_for_empty_prompt`); inputs that no encoder has a part in, such as
    `time_ids`, stay what they are. Raises InvalidInputError unless there is one negative prompt per sample.
    """
    if negatives is not None and len(negatives) != count:
        raise InvalidInputError(f"{len(negatives)} negative prompts for {count} samples: give one each")
    if negatives is not None or not conditioning.zero_negative:
        return encode([""] * count if negatives is None else negatives, conditioning, encoders, tokenizers, size, warn)
    plain = {name: form for name, form in conditioning.inputs.items() if not _reads_text(form)}
    result = assemble(replace(conditioning, inputs=plain), {}, count, size)
    return {
        name: result[name] if name in plain else np.zeros((count, *form.shape), np.float32)
        for name, form in conditioning.inputs.items()
    }


def assemble(
    conditioning: Conditioning, outputs: Mapping[str, np.ndarray], count: int, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Lay the encoders' outputs out as diffpress.runtime.conditioning.TextInput says: `{name: float32 [N, *shape]}`, N = `count`.

    `outputs` has arrays [N, ...] by 'graph.output'; `size` is the image's (height, width) in pixels. Raises InvalidInputError
    naming the input whose parts are missing or do not give its declared shape.
    """
    pieces = {
        **outputs,
        SIZE: np.tile(np.asarray(size, np.float32), (count, 1)),
        CORNER: np.zeros((count, 2), np.float32),
    }
    return {name: _assemble(name, form, pieces, count) for name, form in conditioning.inputs.items()}


def _assemble(name: str, form: TextInput, pieces: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    if len(form.shape) == 1 and (len(form.rows) != 1 or isinstance(form.rows[0], int)):
        raise InvalidInputError(f"input '{name}' has no sequence (shape {form.shape}), so it takes one row of pieces")
    if not form.rows:
        raise InvalidInputError(f"input '{name}' has no rows to be made of")
    rows = [_row(name, row, form.shape, pieces, count) for row in form.rows]
    if sum(row.shape[1] for row in rows) != form.shape[0] or any(row.shape[2:] != form.shape[1:] for row in rows):
        shapes = " / ".join(str(row.shape[1:]) for row in rows)
        raise InvalidInputError(f"input '{name}' is declared as {form.shape} per sample, its rows give {shapes}")
    return np.concatenate(rows, axis=1, dtype=np.float32)


def _row(
    name: str, row: tuple[str, ...] | int, shape: tuple[int, ...], pieces: Mapping[str, np.ndarray], count: int
) -> np.ndarray:
    """One row as [N, length, shape[-1]], or [N, features] for an input without a sequence."""
    if isinstance(row, int):
        return np.zeros((count, row, *shape[1:]), np.float32)
    parts = []
    for piece in row:
        if piece not in pieces:
            raise unknown_name(f"part of input '{name}',", piece, pieces)
        parts.append(pieces[piece])
    sides = {part.shape[:-1] for part in parts}
    if len(sides) != 1 or parts[0].ndim != len(shape) + 1 or len(parts[0]) != count:
        found = ", ".join(f"{piece} {part.shape}" for piece, part in zip(row, parts, strict=True))
        raise InvalidInputError(
            f"input '{name}' for {count} samples of shape {shape} cannot be made of {found or 'nothing'}"
        )
    joined = np.concatenate(parts, axis=-1)
    narrow = shape[-1] - joined.shape[-1]
    if narrow > 0 and len(shape) > 1:  # a vector or a mask that is too short is a mistake, not a row to be filled
        return np.pad(joined, [(0, 0)] * len(shape) + [(0, narrow)])
    return joined


def _run(graph: str, network: TextNetwork, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """One encoder's outputs by 'graph.output', and its attention mask, which some denoisers want to see too."""
    types, given = network.inputs, {IDS: ids, MASK: mask}
    if IDS not in types or not set(types) <= set(given):
        raise InvalidInputError(
            f"{graph}: its inputs are {', '.join(types)}; they should be {IDS} and, if need be, {MASK}"
        )
    outputs = network.run_all({name: given[name].astype(dtype) for name, dtype in types.items()})
    return {f"{graph}.{name}": array for name, array in {MASK: mask, **outputs}.items()}


def _reads_text(form: TextInput) -> bool:
    return any(piece not in (SIZE, CORNER) for row in form.rows if not isinstance(row, int) for piece in row)


def _warn_of_cuts(
    prompts: Sequence[str], encoders: Sequence[TextEncoder], tokens: Mapping[str, Tokens], warn: Warn
) -> None:
    """One line for a prompt and what is lost of it, however many encoders lose the same."""
    losing: dict[tuple[str, int, str], list[str]] = {}
    for encoder in encoders:
        for prompt, unread in zip(prompts, tokens[encoder.graph].unread, strict=True):
            if unread:
                losing.setdefault((prompt, encoder.length, unread), []).append(encoder.graph)
    for (prompt, length, unread), graphs in losing.items():
        losers = f"{', '.join(graphs)} ({length} tokens)"
        warn(f"the prompt '{_brief(prompt, 40)}' is too long for {losers}: left out '{_brief(unread, 200)}'")


def _brief(text: str, limit: int) -> str:
    """The text on one line, cut to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."
