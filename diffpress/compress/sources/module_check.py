"""Check a user's module by evaluating it once on random inputs: what it returns, and that it repeats.

    module(sample [2, ...], timestep [2][, class_labels [2]][, name=tensor [2, ...]])  ->  float32 like `sample`

The first row is evaluated again by itself: it must give the same output, since a sample depends on its own seed and
conditioning alone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.counts import is_large
from diffpress.compress.sources.user_file import user_errors
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.network_inputs import dummy_conditioning, network_conditioning
from diffpress.runtime.spec import DenoiserSpec, is_picture

logger = logging.getLogger(__name__)

BATCH = 2
RELATIVE_TOLERANCE = 1e-2  # of the largest output; other batch sizes use other kernels

Tensors = dict[str, torch.Tensor]


def check_denoiser(module: nn.Module, spec: DenoiserSpec, file: Path) -> None:
    """Check a module against its spec.

    Raises:
        InvalidInputError: The spec cannot be sampled, the module raises, or its output is not what is expected.
    """
    if spec.conditioning.encoders:
        raise InvalidInputError(
            f"{file}: a custom module has no text encoders; leave `encoders` out of its conditioning and encode the "
            "prompts yourself, as a conditioning tensor"
        )
    if spec.latent_factor > 1 and spec.plan.clip:
        logger.warning(
            f"{file}: the plan clips latents to {spec.data_range}, the range of pixels; make the plan with clip=False"
        )
    network_conditioning(spec, dummy_conditioning(spec, 1), is_guided(spec, spec.plan.guidance))
    inputs, forward = dummy_inputs(spec, BATCH), adapter_for(module).forward
    _check(file, "module", lambda feed: forward(module, feed), inputs, spec.sample_shape, again=not is_large(module))


def check_decoder(decoder: nn.Module, spec: DenoiserSpec, file: Path) -> None:
    """Check a decoder, which is called with latents of the spec's sample shape.

    Raises:
        InvalidInputError: It raises, or its output is not what is expected.
    """
    inputs = {"latents": torch.randn(BATCH, *spec.sample_shape, generator=torch.Generator().manual_seed(0))}
    out = _check(file, "decoder", lambda feed: decoder(feed["latents"]), inputs, None, again=not is_large(decoder))
    shape, factor = tuple(out.shape[1:]), spec.latent_factor
    if factor > 1 and is_picture(shape) and shape[1:] != spec.image_size:
        raise InvalidInputError(
            f"{file}: the decoder returns {shape[1]}x{shape[2]} images, but latents {list(spec.sample_shape)} with "
            f"latent_factor {factor} are {spec.image_size[0]}x{spec.image_size[1]}"
        )


def _check(
    file: Path, what: str, run: Any, inputs: Tensors, shape: tuple[int, ...] | None, again: bool
) -> torch.Tensor:
    given = ", ".join(f"{name} {_kind(tensor)} {list(tensor.shape)}" for name, tensor in inputs.items())
    with user_errors(file, f"the {what}, called with {given},"), torch.no_grad():
        out = run(inputs)
    expected = "[N, ...]" if shape is None else str([BATCH, *shape])
    if not isinstance(out, torch.Tensor):
        raise InvalidInputError(f"{file}: the {what} returns a {type(out).__name__}; return one tensor {expected}")
    if out.dtype != torch.float32:
        raise InvalidInputError(f"{file}: the {what} returns {_kind(out)}; return float32, as its inputs are")
    if out.dim() < 2 or len(out) != BATCH or (shape is not None and tuple(out.shape[1:]) != shape):
        raise InvalidInputError(f"{file}: the {what} returns {list(out.shape)} for {given}; expected {expected}")
    if not torch.isfinite(out).all():
        raise InvalidInputError(f"{file}: the {what} returns NaN or infinite values for random inputs")
    if again:
        with user_errors(file, f"the {what}, called with a batch of 1,"), torch.no_grad():
            alone = run({name: tensor[:1] for name, tensor in inputs.items()})
        tolerance = RELATIVE_TOLERANCE * float(out.abs().max())
        if alone.shape != out[:1].shape or float((alone - out[:1]).abs().max()) > tolerance:
            raise InvalidInputError(
                f"{file}: the {what} returns different values for the same sample alone and in a batch of {BATCH}; "
                "remove random numbers, dropout outside of nn.Dropout, and statistics over the batch from its forward"
            )
    return out


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
