"""What a client feeds besides noise, and the denoiser's inputs that a sampler graph makes of it.

    labels [N]                                                   class-conditional models
    input_ids [N, L], input_ids_2 ...                            tokens of the prompts, one input for each text encoder
    attention_mask [N, L], ...                                   1 for the prompt's tokens, if the model reads it
    uncond_input_ids, uncond_attention_mask ...                  the same of the negative prompts, under guidance
    tensors by name [N, ...]                                     models that are conditioned on tensors
    guidance []                                                  guidance weight, under guidance

Under guidance both halves are encoded in one batch. For a model whose inputs are zeros without a negative prompt
(`zero_negative`), ids of NO_PROMPT stand for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from diffpress.export.graph.model import Graph
from diffpress.export.targets.sampler.block import BATCH, Block, dtypes_of, value_info
from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import GUIDANCE as GUIDANCE_INPUT
from diffpress.runtime.network_inputs import LABELS as LABELS_INPUT
from diffpress.runtime.prompts import CORNER, IDS, MASK, SIZE, reads_text

NOISE, LABELS, GUIDANCE, IMAGES = "noise", "labels", "guidance", "images"
UNCOND = "uncond_"
NO_PROMPT = -1
NO_GUIDANCE = 1.0


@dataclass
class Inputs:
    """The graph's inputs so far, and how many rows the denoiser has.

    Attributes:
        block: The main block.
        guided: Whether both halves of guidance are evaluated.
        count: N, int64 [1].
        values: Descriptions of the inputs, in order.
    """

    block: Block
    guided: bool
    count: str
    values: list[onnx.ValueInfoProto] = field(default_factory=list)

    @property
    def rows(self) -> str:
        """Rows of one evaluation: N, or 2 N under guidance, int64 [1]."""
        return self.block.op("Mul", self.count, self.block.constant([2], np.int64)) if self.guided else self.count

    def add(self, name: str, dtype: str, *shape: int | str) -> str:
        """Add an input; returns its name."""
        self.values.append(value_info(name, np.dtype(dtype), shape))
        return name

    def halves(self, cond: str, uncond: str) -> str:
        """Return the cond half followed by the uncond half."""
        return self.block.op("Concat", cond, uncond, axis=0)


def mask_is_read(conditioning: Conditioning, encoder: TextEncoder, inputs: Sequence[str]) -> bool:
    """Return whether a model reads the attention mask of this encoder's tokens; `inputs` are those of its graph."""
    piece = f"{encoder.graph}.{MASK}"
    rows = (row for entry in conditioning.inputs.values() for row in entry.rows if not isinstance(row, int))
    return MASK in inputs or any(piece in row for row in rows)


def add_conditioning(
    inputs: Inputs,
    conditioning: Conditioning,
    types: Mapping[str, np.dtype],
    encoders: Mapping[str, Graph],
    size: tuple[int, int],
) -> tuple[dict[str, str], str | None]:
    """Add all inputs besides noise; returns the denoiser's static inputs [rows, ...], and the guidance weight, if any.

    Args:
        inputs: Gets the inputs.
        conditioning: The model's conditioning.
        types: Dtypes of the denoiser's inputs.
        encoders: Graphs of the text encoders by name.
        size: Height and width of the image in pixels.
    """
    block = inputs.block
    added = {"class": _labels, "tensors": _tensors}.get(conditioning.kind)
    if added is not None:
        found = added(inputs, conditioning)
    else:
        found = _texts(inputs, conditioning, encoders, size) if conditioning.kind == "text" else {}
    static = {name: block.cast(tensor, types[name]) for name, tensor in found.items()}
    weight = None
    if inputs.guided or conditioning.guidance_input:
        weight = inputs.add(GUIDANCE, "float32")
    if conditioning.guidance_input and weight is not None:
        typed = block.cast(weight, types[GUIDANCE_INPUT])
        return {**static, GUIDANCE_INPUT: block.op("Expand", typed, inputs.rows)}, None
    # a weight of 1 or less means no guidance, as in the runtime
    return static, weight and block.op("Max", weight, block.constant(NO_GUIDANCE))


def _labels(inputs: Inputs, conditioning: Conditioning) -> dict[str, str]:
    labels = inputs.add(LABELS, "int64", BATCH)
    if not inputs.guided:
        return {LABELS_INPUT: labels}
    if conditioning.null_label is None:
        raise InvalidInputError("target sampler: guidance needs a null label, but the model has none; use guidance 1")
    null = inputs.block.repeated(conditioning.null_label, inputs.count, np.int64)
    return {LABELS_INPUT: inputs.halves(labels, null)}


def _tensors(inputs: Inputs, conditioning: Conditioning) -> dict[str, str]:
    found = {}
    for name, entry in conditioning.tensors.items():
        cond = inputs.add(name, entry.dtype, BATCH, *entry.shape)
        null = entry.null_array
        uncond = cond if null is None else inputs.block.repeated(null, inputs.count, entry.dtype)
        found[name] = inputs.halves(cond, uncond) if inputs.guided else cond
    return found


def _texts(
    inputs: Inputs, conditioning: Conditioning, encoders: Mapping[str, Graph], size: tuple[int, int]
) -> dict[str, str]:
    block, rows = inputs.block, inputs.rows
    pieces = {SIZE: (block.repeated(size, rows), 2), CORNER: (block.repeated((0.0, 0.0), rows), 2)}
    has_prompt = None
    for number, encoder in enumerate(conditioning.encoders, 1):
        graph = encoders[encoder.graph]
        ids = _token_input(inputs, IDS, number, encoder.length)
        if inputs.guided and conditioning.zero_negative:
            if has_prompt is None:
                has_prompt = _has_prompt(inputs, ids)
            ids = block.op("Max", ids, block.constant(0, np.int64))
        types = dtypes_of(graph.proto.graph.input)
        feed = {IDS: block.cast(ids, types[IDS], np.int64)}
        if mask_is_read(conditioning, encoder, list(types)):
            mask = _token_input(inputs, MASK, number, encoder.length)
            pieces[f"{encoder.graph}.{MASK}"] = block.cast(mask, np.float32), encoder.length
            feed |= {MASK: block.cast(mask, types[MASK], np.int64)} if MASK in types else {}
        outputs = graph.proto.graph.output
        for value, tensor in zip(outputs, block.network(graph, encoder.graph, feed), strict=True):
            found = block.cast(tensor, np.float32, dtypes_of([value])[value.name])
            pieces[f"{encoder.graph}.{value.name}"] = found, value.type.tensor_type.shape.dim[-1].dim_value
    assembled = {name: _assembled(block, entry, pieces, rows) for name, entry in conditioning.inputs.items()}
    if has_prompt is None:
        return assembled
    return {
        name: _zeroed(block, tensor, has_prompt, len(entry.shape)) if reads_text(entry) else tensor
        for (name, entry), tensor in zip(conditioning.inputs.items(), assembled.values(), strict=True)
    }


def _token_input(inputs: Inputs, kind: str, number: int, length: int) -> str:
    """Add the input of an encoder's ids or mask, and that of the uncond half; returns both halves, int64 [rows, L]."""
    name = kind if number == 1 else f"{kind}_{number}"
    cond = inputs.add(name, "int64", BATCH, length)
    return inputs.halves(cond, inputs.add(f"{UNCOND}{name}", "int64", BATCH, length)) if inputs.guided else cond


def _has_prompt(inputs: Inputs, ids: str) -> str:
    """Return 1 for each row with a prompt and 0 for one whose ids are all NO_PROMPT, float32 [rows]."""
    block = inputs.block
    largest = block.op("ReduceMax", ids, block.constant([1], np.int64), keepdims=0)
    return block.cast(block.op("Greater", largest, block.constant(NO_PROMPT, np.int64)), np.float32)


def _zeroed(block: Block, tensor: str, has_prompt: str, rank: int) -> str:
    column = block.op("Reshape", has_prompt, block.constant([-1, *[1] * rank], np.int64))
    return block.op("Mul", tensor, column)


def _assembled(block: Block, entry: TextInput, pieces: Mapping[str, tuple[str, int]], rows: str) -> str:
    """Return one text input, float32 [rows, *shape]; see runtime/prompts.py, which checks the same layout."""
    parts = []
    for row in entry.rows:
        if isinstance(row, int):
            parts.append(block.repeated(np.zeros((row, *entry.shape[1:])), rows))
            continue
        tensors, widths = zip(*(pieces[piece] for piece in row), strict=True)
        joined = tensors[0] if len(tensors) == 1 else block.op("Concat", *tensors, axis=-1)
        missing = entry.shape[-1] - sum(widths)
        if missing > 0 and len(entry.shape) > 1:
            rank = len(entry.shape) + 1
            joined = block.op("Pad", joined, block.constant([*[0] * (2 * rank - 1), missing], np.int64))
        parts.append(joined)
    return parts[0] if len(parts) == 1 else block.op("Concat", *parts, axis=1)
