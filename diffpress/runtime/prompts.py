"""Prompts to text inputs of the denoiser: tokenize, encode, assemble.

    prompt --tokenizer--> ids, mask [N, L] --text encoder--> hidden states [N, L, D], pooled [N, D] --rows--> inputs

The encoders and the layout of their outputs are data (conditioning.Conditioning), so that one function assembles the
inputs of every model. With | for concatenation along the features and / along the sequence:

    SD 1.x, PixArt   encoder_hidden_states = hidden
    SDXL             encoder_hidden_states = hidden_1 | hidden_2,          time_ids = size | corner | size
    SD3              encoder_hidden_states = (hidden_1 | hidden_2 | 0) / hidden_3
    Flux             txt_ids = L rows of zeros

Tokenizers are files of the `tokenizers` library (tokenizer.json), which the extra `text` installs.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError, unknown_name

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

IDS, MASK = "input_ids", "attention_mask"
SIZE, CORNER = "size", "corner"
BATCH = 8  # prompts per encoder run; bounds the memory of its activations


class TextNetwork(Protocol):
    """The interface of a text encoder: an engine, or a thin wrapper around a torch module."""

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """The graph's inputs and their dtypes: `input_ids`, and `attention_mask` if it takes one."""

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return all outputs by name, each [N, ...], for one batch of ids [N, L]."""


class Tokens(NamedTuple):
    """Tokenized prompts, and the truncated part of each prompt."""

    ids: np.ndarray  # int64 [N, L]
    mask: np.ndarray  # int64 [N, L]: 1 for tokens of the prompt, special ones included, 0 for padding
    unread: tuple[str, ...]  # N texts, empty if the prompt was not truncated


def open_tokenizer(file: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        InvalidInputError: The file is missing or not a tokenizer.json.
        MissingDependencyError: The `tokenizers` library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingDependencyError("tokenizers", "text", "reading prompts") from error
    if not Path(file).is_file():
        raise InvalidInputError(f"{file}: no such file")
    try:
        return Tokenizer.from_file(str(file))
    except BaseException as error:  # the library raises no narrower class, and a panic in its Rust code is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidInputError(f"{file}: not a tokenizer.json of the tokenizers library ({error})") from error


def _encoded(tokenizer: Tokenizer, text: str, encoder: TextEncoder) -> Encoding:
    """Encode one text; raises InvalidInputError if the tokenizer's rules fail on it."""
    try:
        return tokenizer.encode(text)
    except BaseException as error:  # a panic in the library's Rust code is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        raise InvalidInputError(
            f"{encoder.graph}: its tokenizer fails on a prompt of {len(text)} characters ({reason})"
        ) from error


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], encoder: TextEncoder) -> Tokens:
    """Tokenize prompts to exactly `encoder.length` ids each: truncated before the final special token, or padded.

    Equal to transformers' `padding="max_length", truncation=True`. `encoder.lower` applies PixArt's preprocessing first
    (diffusers, `_text_preprocessing` without `clean_caption`). The tokenizer's own truncation and padding, which a file
    may contain from training, are overwritten.

    Raises:
        InvalidInputError: `encoder.length` is smaller than the number of special tokens.
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
        text = with_all_vectors(tokenizer, prompt.lower().strip() if encoder.lower else prompt)
        encoding = _encoded(tokenizer, text, encoder)
        ids[row, : len(encoding.ids)] = encoding.ids
        mask[row, : len(encoding.ids)] = 1
        # the overflow contains special tokens, which have no position in the text
        lost = (
            span[0]
            for overflow in encoding.overflowing
            for span, special in zip(overflow.offsets, overflow.special_tokens_mask, strict=True)
            if not special
        )
        unread.append(text[next(lost, len(text)) :].strip())
    return Tokens(ids, mask, tuple(unread))


def with_all_vectors(tokenizer: Tokenizer, prompt: str) -> str:
    """Replace each token of a textual inversion of several vectors by the tokens of all of them.

    '<cat>' becomes '<cat> <cat>_1 <cat>_2' if the tokenizer has these tokens, equal to diffusers'
    `TextualInversionLoaderMixin.maybe_convert_prompt`.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if not any(f"{token}_1" in added for token in added):
        return prompt
    encoding = tokenizer.encode(prompt, add_special_tokens=False)
    found = [encoding, *encoding.overflowing]  # also tokens beyond the limit of the tokenizer
    for token in dict.fromkeys(token for part in found for token in part.tokens if token in added):
        further = itertools.takewhile(added.__contains__, (f"{token}_{index}" for index in itertools.count(1)))
        prompt = prompt.replace(token, " ".join([token, *further]))
    return prompt


def encode(
    prompts: Sequence[str],
    conditioning: Conditioning,
    encoders: Mapping[str, TextNetwork],
    tokenizers: Mapping[str, Tokenizer],
    size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Encode prompts into the denoiser's text inputs, `{name: float32 [N, *shape]}`. Equal prompts are encoded once.

    Args:
        prompts: N prompts.
        conditioning: The model's conditioning.
        encoders: Text encoders by graph (`TextEncoder.graph`).
        tokenizers: Tokenizers by folder (`TextEncoder.tokenizer`).
        size: The image's (height, width) in pixels.

    Raises:
        InvalidInputError: As in `tokenize` and `assemble`.
    """
    unique = list(dict.fromkeys(prompts))
    position = {prompt: index for index, prompt in enumerate(unique)}
    index = np.array([position[prompt] for prompt in prompts], dtype=np.int64)
    tokens = {e.graph: tokenize(tokenizers[e.tokenizer], unique, e) for e in conditioning.encoders}
    _warn_if_truncated(unique, conditioning.encoders, tokens)

    result = {name: np.empty((len(prompts), *entry.shape), np.float32) for name, entry in conditioning.inputs.items()}
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
) -> dict[str, np.ndarray]:
    """Return the text inputs of the uncond half of `count` samples, in the form that `encode` returns.

    Negative prompts are encoded like any prompt. Without them the empty prompt is encoded; with `zero_negative` the
    inputs are zeros instead and no encoder runs (diffusers, SDXL's `force_zeros_for_empty_prompt`), except for inputs
    that contain no encoder output, such as `time_ids`.

    Raises:
        InvalidInputError: The number of negative prompts is not `count`.
    """
    if negatives is not None and len(negatives) != count:
        raise InvalidInputError(f"{len(negatives)} negative prompts for {count} samples: give one per sample")
    if negatives is not None or not conditioning.zero_negative:
        return encode([""] * count if negatives is None else negatives, conditioning, encoders, tokenizers, size)
    plain = {name: entry for name, entry in conditioning.inputs.items() if not reads_text(entry)}
    result = assemble(replace(conditioning, inputs=plain), {}, count, size)
    return {
        name: result[name] if name in plain else np.zeros((count, *entry.shape), np.float32)
        for name, entry in conditioning.inputs.items()
    }


def assemble(
    conditioning: Conditioning, outputs: Mapping[str, np.ndarray], count: int, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Assemble the text inputs from the encoders' outputs (conditioning.TextInput): `{name: float32 [N, *shape]}`.

    Args:
        conditioning: The model's conditioning.
        outputs: Encoder outputs [N, ...] by 'graph.output'.
        count: N.
        size: The image's (height, width) in pixels.

    Raises:
        InvalidInputError: The pieces of an input are missing or do not have its declared shape.
    """
    pieces = {
        **outputs,
        SIZE: np.tile(np.asarray(size, np.float32), (count, 1)),
        CORNER: np.zeros((count, 2), np.float32),
    }
    return {name: _assemble(name, entry, pieces, count) for name, entry in conditioning.inputs.items()}


def _assemble(name: str, entry: TextInput, pieces: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    if len(entry.shape) == 1 and (len(entry.rows) != 1 or isinstance(entry.rows[0], int)):
        raise InvalidInputError(f"input '{name}' has no sequence (shape {entry.shape}), so it takes one row of pieces")
    if not entry.rows:
        raise InvalidInputError(f"input '{name}' has no rows")
    rows = [_row(name, row, entry.shape, pieces, count) for row in entry.rows]
    if sum(row.shape[1] for row in rows) != entry.shape[0] or any(row.shape[2:] != entry.shape[1:] for row in rows):
        shapes = " / ".join(str(row.shape[1:]) for row in rows)
        raise InvalidInputError(f"input '{name}' is declared as {entry.shape} per sample, but its rows give {shapes}")
    return np.concatenate(rows, axis=1, dtype=np.float32)


def _row(
    name: str, row: tuple[str, ...] | int, shape: tuple[int, ...], pieces: Mapping[str, np.ndarray], count: int
) -> np.ndarray:
    """One row as [N, length, shape[-1]], or [N, features] for an input without a sequence."""
    if isinstance(row, int):
        return np.zeros((count, row, *shape[1:]), np.float32)
    arrays = []
    for piece in row:
        if piece not in pieces:
            raise unknown_name(f"piece of input '{name}',", piece, pieces)
        arrays.append(pieces[piece])
    leading = {array.shape[:-1] for array in arrays}
    if len(leading) != 1 or arrays[0].ndim != len(shape) + 1 or len(arrays[0]) != count:
        found = ", ".join(f"{piece} {array.shape}" for piece, array in zip(row, arrays, strict=True))
        raise InvalidInputError(
            f"input '{name}' for {count} samples of shape {shape} cannot be assembled from {found or 'nothing'}"
        )
    joined = np.concatenate(arrays, axis=-1)
    missing = shape[-1] - joined.shape[-1]
    if missing > 0 and len(shape) > 1:  # a vector or a mask that is too short is an error and is not padded
        return np.pad(joined, [(0, 0)] * len(shape) + [(0, missing)])
    return joined


def _run(graph: str, network: TextNetwork, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """One encoder's outputs by 'graph.output', with its attention mask, which some denoisers take as an input."""
    types, available = network.inputs, {IDS: ids, MASK: mask}
    if IDS not in types or not set(types) <= set(available):
        raise InvalidInputError(f"{graph}: its inputs are {', '.join(types)}; expected {IDS} and optionally {MASK}")
    outputs = network.run_all({name: available[name].astype(dtype) for name, dtype in types.items()})
    return {f"{graph}.{name}": array for name, array in {MASK: mask, **outputs}.items()}


def reads_text(entry: TextInput) -> bool:
    """Return whether a text input contains an encoder's output or mask, and not only sizes."""
    return any(piece not in (SIZE, CORNER) for row in entry.rows if not isinstance(row, int) for piece in row)


def _warn_if_truncated(prompts: Sequence[str], encoders: Sequence[TextEncoder], tokens: Mapping[str, Tokens]) -> None:
    """Warn once for each group of encoders that truncates prompts at the same place, naming the first prompt."""
    truncated: dict[tuple[str, int, str], list[str]] = {}
    for encoder in encoders:
        for prompt, unread in zip(prompts, tokens[encoder.graph].unread, strict=True):
            if unread:
                truncated.setdefault((prompt, encoder.length, unread), []).append(encoder.graph)
    by_encoders: dict[str, list[tuple[str, str]]] = {}
    for (prompt, length, unread), graphs in truncated.items():
        by_encoders.setdefault(f"{', '.join(graphs)} ({length} tokens)", []).append((prompt, unread))
    for names, ((prompt, unread), *others) in by_encoders.items():
        are, so_on = (f"and {len(others)} more are", " and so on") if others else ("is", "")
        logger.warning(
            f"the prompt '{_brief(prompt, 40)}' {are} too long for {names}: left out '{_brief(unread, 200)}'{so_on}"
        )


def _brief(text: str, limit: int) -> str:
    """The text on one line, truncated to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."
