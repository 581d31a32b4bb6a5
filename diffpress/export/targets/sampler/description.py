"""sampler.json: what a client in any language feeds to sampler.onnx, and what it gets.

    inputs    name -> {dtype, shape, and how to make it: distribution, classes, tokenizer and length, default}
    outputs   images: {dtype, shape, layout, range}

A dimension of "batch" is the number of images. A default is the value for one image: the tokens of an empty negative
prompt, and the plan's guidance weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffpress.export.graph.model import Graph
from diffpress.export.manifest import tensors_of
from diffpress.export.targets.sampler.conditioning import GUIDANCE, IMAGES, LABELS, NO_PROMPT, NOISE, UNCOND
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.conditioning import TextEncoder
from diffpress.runtime.prompts import IDS, MASK, open_tokenizer, tokenize
from diffpress.runtime.spec import DenoiserSpec

FORMAT = 1


def describe_sampler(bundle: Bundle, spec: DenoiserSpec, graph: Graph, file: str) -> dict[str, Any]:
    """Return the content of sampler.json for a bundle's sampler graph in `file`."""
    inputs = tensors_of(graph.proto.graph.input)
    for name, entry in inputs.items():
        entry |= _making(bundle, spec, name)
    outputs = tensors_of(graph.proto.graph.output)
    outputs[IMAGES] |= {"layout": "NHWC", "range": [0.0, 1.0]}
    plan = spec.plan
    sampling = {"solver": plan.solver, "steps": plan.steps, "timesteps": list(plan.timesteps)}
    return {"format": FORMAT, "file": file, "inputs": inputs, "outputs": outputs, "sampling": sampling}


def token_inputs(spec: DenoiserSpec) -> dict[str, tuple[TextEncoder, str]]:
    """Return name of every possible input of tokens -> its text encoder, and whether it holds ids or a mask."""
    found: dict[str, tuple[TextEncoder, str]] = {}
    for number, encoder in enumerate(spec.conditioning.encoders, 1):
        for kind in (IDS, MASK):
            name = kind if number == 1 else f"{kind}_{number}"
            found |= {name: (encoder, kind), f"{UNCOND}{name}": (encoder, kind)}
    return found


def default_tokens(bundle: Bundle, spec: DenoiserSpec, encoder: TextEncoder, kind: str) -> np.ndarray:
    """Return the ids or the mask of no negative prompt, int64 [L]."""
    empty = tokenize(open_tokenizer(bundle.path / encoder.tokenizer / "tokenizer.json"), [""], encoder)
    if kind == MASK:
        return empty.mask[0]
    return np.full(encoder.length, NO_PROMPT, np.int64) if spec.conditioning.zero_negative else empty.ids[0]


def _making(bundle: Bundle, spec: DenoiserSpec, name: str) -> dict[str, Any]:
    """Return how a client makes an input."""
    conditioning, tokens = spec.conditioning, token_inputs(spec)
    if name in tokens:
        encoder, kind = tokens[name]
        entry: dict[str, Any] = {"tokenizer": encoder.tokenizer, "length": encoder.length}
        entry |= {"pad": encoder.pad if kind == IDS else 0, "lower": encoder.lower}
        if name.startswith(UNCOND):
            entry["default"] = default_tokens(bundle, spec, encoder, kind).tolist()
        return entry
    known: dict[str, dict[str, Any]] = {
        NOISE: {"distribution": "standard normal"},
        LABELS: {"classes": conditioning.classes},
        GUIDANCE: {"default": spec.plan.guidance},
    }
    return known.get(name, {})
