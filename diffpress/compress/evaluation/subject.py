"""The subject of an evaluation: a denoiser as a source of images, with its prompts or classes in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from diffpress.runtime.network_inputs import ConditioningInputs, Network, dummy_conditioning
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampler import cycled_labels
from diffpress.runtime.spec import DenoiserSpec


def unchanged(samples: np.ndarray) -> np.ndarray:
    """Return samples that are images already."""
    return samples


def _do_nothing() -> None:
    return None


@dataclass(frozen=True)
class EvaluationSubject:
    """What is sampled for an evaluation.

    Attributes:
        network: The denoiser.
        spec: Its spec.
        decode: Samples [N, C, H, W] -> images, for models of latents.
        encode: (prompts, spec) -> conditioning, for models conditioned on text that have text encoders.
        texts: Prompts of a text model, used in turn.
        close: Releases what was opened.
    """

    network: Network
    spec: DenoiserSpec
    decode: Callable[[np.ndarray], np.ndarray] = unchanged
    encode: Callable[[Sequence[str], DenoiserSpec], ConditioningInputs] | None = None
    texts: tuple[str, ...] = ()
    close: Callable[[], None] = field(default=_do_nothing, repr=False)

    def with_spec(self, spec: DenoiserSpec) -> EvaluationSubject:
        """Return the subject with another spec, such as one with another sampling plan."""
        return replace(self, spec=spec)

    def labels(self, count: int) -> np.ndarray | None:
        """Return the labels of `count` samples: the classes in turn; None for a model without classes."""
        return cycled_labels(self.spec, count)

    def prompts(self, count: int) -> list[str]:
        """Return the prompts of `count` samples, in turn; empty for a model that encodes no text."""
        return [self.texts[i % len(self.texts)] for i in range(count)] if self.encode and self.texts else []

    def conditions(self, count: int) -> ConditioningInputs:
        """Return the conditioning of `count` samples: prompts or classes in turn; dummies without text encoders."""
        prompts = self.prompts(count)
        if not prompts or self.encode is None:
            return dummy_conditioning(self.spec, count)
        return self.encode(prompts, self.spec)


def pipeline_subject(pipeline: Pipeline, texts: Sequence[str] = ()) -> EvaluationSubject:
    """Return an open bundle as a subject."""

    def encode(prompts: Sequence[str], spec: DenoiserSpec) -> ConditioningInputs:
        return pipeline.conditions(len(prompts), spec, prompts=prompts)

    encodes = bool(pipeline.spec.conditioning.encoders)
    return EvaluationSubject(
        pipeline.denoiser,
        pipeline.spec,
        pipeline.decode,
        encode if encodes else None,
        tuple(texts),
        pipeline.close,
    )
