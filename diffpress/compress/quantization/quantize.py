"""The quantize stage: choose formats, calibrate on the model's own sampling trajectory and, in mode qat, train.

The result is data, not a patched module: the checkpoint keeps its float weights and the amax of every quantizer.
`fake_quantized` inserts the quantizers where the quantized model runs in torch. The mean quantization error of the
output is stored in the sampling plan, and the sampler subtracts it (algorithms/output_correction.py).
"""

from __future__ import annotations

import logging

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.quantization.algorithms.gptq import round_weights
from diffpress.compress.quantization.algorithms.mixed_precision import check_bounds, mix
from diffpress.compress.quantization.algorithms.output_correction import correct
from diffpress.compress.quantization.algorithms.qat import qat
from diffpress.compress.quantization.algorithms.svdquant import with_svdquant
from diffpress.compress.quantization.calibration.calibrate import calibrate
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.layer_selection import choose_formats, quantized_outputs
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.unified_scales import unify_scales

logger = logging.getLogger(__name__)


def quantize(checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> Checkpoint:
    """Return the checkpoint with the scales of every quantized layer; mode qat also trains its weights.

    Raises:
        InvalidInputError: The settings do not fit the model, or a scale is zero, infinite or missing.
        GateFailedError: `config.bounds` cannot be kept together.
    """
    check_bounds(config, checkpoint.spec, ctx.open_engine_costs is not None)
    formats = choose_formats(checkpoint.model, config)
    outputs = quantized_outputs(checkpoint, formats, config)
    amax, smooth = calibrate(checkpoint, formats, outputs, config, ctx)
    # a smoothed layer quantizes a scaled copy of the concatenated tensor, so its input scale is its own
    amax |= unify_scales(checkpoint, {key: a for key, a in amax.items() if key.removesuffix(".input") not in smooth})
    others = {name: kind for name, kind in formats.items() if kind != config.format}
    scales = Quantization(config.format, amax, others, smooth)
    logger.info(_format_counts(formats))
    if config.bounds is not None:
        scales = mix(checkpoint, scales, config, ctx)
    if config.svdquant_rank:
        scales = with_svdquant(checkpoint, scales, config.svdquant_rank)
    quantized = checkpoint.evolve(quantization=scales)
    if config.rounding == "gptq":
        quantized = round_weights(quantized, config, ctx)
    if config.mode == "qat":
        student = fake_quantized(quantized.evolve(model=quantized.clone_model().float()))
        return qat(checkpoint, scales, student, config, ctx)
    return correct(quantized, checkpoint.model, config, ctx) if config.output_correction else quantized


def _format_counts(formats: dict[str, str]) -> str:
    counts = {kind: list(formats.values()).count(kind) for kind in FORMATS}
    return ", ".join(f"{count} layers in {kind}" for kind, count in counts.items() if count)
