"""Open what a user names as an evaluation's subject: a bundle in an engine, or a checkpoint in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.evaluation.subject import EvaluationSubject, pipeline_subject, unchanged
from diffpress.compress.models.components import DECODER, component_names, load_component
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.teacher_data import TeacherData
from diffpress.runtime.bundle import find_bundle, load_bundle
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.pipeline import Pipeline, decoded
from diffpress.runtime.spec import DenoiserSpec


def open_subject(
    reference: str,
    engine: str | None = None,
    options: EngineOptions | None = None,
    texts: Sequence[str] = (),
) -> EvaluationSubject:
    """Open a bundle in an engine, or a checkpoint in torch (fake-quantized if quantized).

    Engine and options are those of a bundle; a checkpoint takes none of them.
    """
    if find_bundle(reference) is not None:
        return pipeline_subject(Pipeline(load_bundle(reference), engine, options=options), texts)
    checkpoint = load_checkpoint(reference)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = TorchNetwork(fake_quantized(checkpoint).to(device), checkpoint.spec)
    decode = _decoder(checkpoint) if DECODER in component_names(checkpoint) else unchanged
    encode = _encoder(checkpoint) if checkpoint.spec.conditioning.encoders else None
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


def _encoder(checkpoint: Checkpoint) -> Callable[[Sequence[str], DenoiserSpec], ConditioningInputs]:
    def encode(prompts: Sequence[str], spec: DenoiserSpec) -> ConditioningInputs:
        data = TeacherData(checkpoint.evolve(spec=spec), len(prompts), Path(), tuple(prompts))
        return data.conditions(len(prompts))

    return encode


def _decoder(checkpoint: Checkpoint) -> Callable[[np.ndarray], np.ndarray]:
    spec, component = checkpoint.spec, load_component(checkpoint, DECODER)

    return lambda samples: decoded(lambda x: component.run_all({"latent_sample": x})["sample"], samples, spec)
