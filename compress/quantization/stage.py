"""The quantize stage: choose formats, calibrate on the model's own trajectory, and train if asked to.

The result is data, not a patched module: the checkpoint keeps its float weights beside the amax of every quantizer,
and `fake_quantized` puts the quantizers back wherever the quantized model has to be run in torch.
"""

from __future__ import annotations

from compress.checkpoint import Checkpoint, Quantization
from compress.config import QuantizeConfig
from compress.context import Context, say
from compress.quantization.calibration import calibrate
from compress.quantization.formats import FORMATS
from compress.quantization.layers import choose_formats, rounded_outputs
from compress.quantization.qat import qat
from compress.quantization.quantizers import fake_quantized, with_quantizers


def quantize(checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> Checkpoint:
    """Calibrate; returns the same float model with the scales of every quantized layer. Mode qat then trains it."""
    formats = choose_formats(checkpoint.model, config)
    outputs = rounded_outputs(checkpoint.model, formats, config)
    amax = calibrate(with_quantizers(checkpoint.shared_model(), formats, outputs), checkpoint, config, ctx)
    scales = Quantization(config.format, amax, {n: kind for n, kind in formats.items() if kind != config.format})
    say(_counted(formats))
    if config.mode == "ptq":
        return checkpoint.evolve(quantization=scales)
    student = fake_quantized(checkpoint.evolve(model=checkpoint.clone_model().float(), quantization=scales))
    return qat(checkpoint, scales, student, config, ctx)


def _counted(formats: dict[str, str]) -> str:
    counts = {kind: list(formats.values()).count(kind) for kind in FORMATS}
    return ", ".join(f"{count} layers in {kind}" for kind, count in counts.items() if count)
