"""Open what a user names as an evaluation's subject: a bundle in an engine, or a checkpoint in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.evaluation.subject import EvaluationSubject, pipeline_subject, unchanged
from diffpress.compress.models.components import (
    DECODER,
    Component,
    component_names,
    load_component,
    prompt_conditions,
)
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.components import decode, quantized_components
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.bundle import find_bundle, load_bundle
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs, Network
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.trust.signature import refuse_unsigned


def open_subject(
    reference: str,
    engine: str | None = None,
    options: EngineOptions | None = None,
    texts: Sequence[str] = (),
    public_key: str | Path | None = None,
) -> EvaluationSubject:
    """Open a bundle in an engine, or a checkpoint in torch (fake-quantized if quantized).

    Engine and options are those of a bundle; a checkpoint takes none of them. A `public_key` is the PEM file of the key
    that the bundle has to be signed with; a checkpoint is then refused.
    """
    if find_bundle(reference) is not None:
        return pipeline_subject(Pipeline(load_bundle(reference, public_key), engine, options=options), texts)
    refuse_unsigned(reference, public_key)
    checkpoint = load_checkpoint(reference)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = TorchNetwork(fake_quantized(checkpoint).to(device), checkpoint.spec)
    return checkpoint_subject(checkpoint, network, texts)


def checkpoint_subject(checkpoint: Checkpoint, network: Network, texts: Sequence[str] = ()) -> EvaluationSubject:
    """Return a subject whose denoiser is `network` and whose other components are the checkpoint's, in torch."""
    quantized = quantized_components(checkpoint)
    decode = _decoder(checkpoint, quantized) if DECODER in component_names(checkpoint) else unchanged
    encode = _encoder(checkpoint, quantized) if checkpoint.spec.conditioning.encoders else None
    return EvaluationSubject(network, checkpoint.spec, decode, encode, tuple(texts))


def check_engine_options(subjects: Sequence[str], engine: str | None, options: EngineOptions) -> None:
    """Raise InvalidInputError if an engine or options other than threads are named, but no subject is a bundle."""
    given = [*(["engine"] if engine else []), *(name for name in options.non_default if name != "threads")]
    if given and not any(find_bundle(subject) for subject in subjects):
        raise InvalidInputError(
            f"{subjects[0]}: a checkpoint runs in torch, without an engine: leave out {' and '.join(given)}, or name a "
            "bundle"
        )


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _encoder(
    checkpoint: Checkpoint, quantized: Mapping[str, Component]
) -> Callable[[Sequence[str], DenoiserSpec], ConditioningInputs]:
    return lambda prompts, spec: prompt_conditions(checkpoint.evolve(spec=spec), prompts, quantized)


def _decoder(checkpoint: Checkpoint, quantized: Mapping[str, Component]) -> Callable[[np.ndarray], np.ndarray]:
    decoder = quantized.get(DECODER) or load_component(checkpoint, DECODER)
    return lambda samples: decode(decoder, samples, checkpoint.spec)
