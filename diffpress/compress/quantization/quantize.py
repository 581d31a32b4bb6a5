"""The quantize stage: choose formats, calibrate on the model's own trajectories, and round or train the weights.

The result is data, not a patched module: the checkpoint keeps its float weights and the amax of every quantizer.
`fake_quantized` inserts the quantizers where the quantized model runs in torch. The mean quantization error of the
output is stored in the sampling plan, and the sampler subtracts it (algorithms/output_correction.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.distillation.block_features import blocks_left
from diffpress.compress.models.adapter import small_spec
from diffpress.compress.models.components import DECODER
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.algorithms.awq import awq_vectors
from diffpress.compress.quantization.algorithms.gptq import round_weights
from diffpress.compress.quantization.algorithms.mixed_precision import check_bounds, within_bounds
from diffpress.compress.quantization.algorithms.output_correction import corrects_output, with_output_corrections
from diffpress.compress.quantization.algorithms.qat import qat
from diffpress.compress.quantization.algorithms.smoothquant import smoothing_vectors
from diffpress.compress.quantization.algorithms.svdquant import with_svdquant
from diffpress.compress.quantization.calibration.calibrate import calibrate, check_calibration
from diffpress.compress.quantization.components import component_formats, quantize_components
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.layer_graph import LayerGraph, trace_layer_graph
from diffpress.compress.quantization.layer_selection import (
    choose_formats,
    described,
    nothing_quantized,
    quantized_outputs,
    reasons_for_float,
)
from diffpress.compress.quantization.quantizers import fake_quantized, quantizers_that_ran
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset
from diffpress.compress.quantization.unified_scales import unify_scales
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import dummy_inputs

logger = logging.getLogger(__name__)


def quantize(checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> Checkpoint:
    """Return the checkpoint with the scales of every quantized layer; GPTQ and QAT also change its weights.

    Raises:
        InvalidInputError: The settings do not fit the model, nothing of it can be quantized, or a value is not finite.
        GateFailedError: `config.bounds` cannot be kept together.
    """
    model, spec = checkpoint.model, checkpoint.spec
    if config.bounds:
        check_bounds(config.bounds, spec, ctx.open_engine_costs is not None)
    formats = choose_formats(model, config)
    check_calibration(formats, config)
    check_keeps_sparsity(checkpoint, config)
    component_formats(checkpoint, config)
    graph = trace_layer_graph(model, small_spec(model, spec))
    formats = {name: kind for name, kind in formats.items() if name in graph.ranks}
    dataset = trajectories_of(checkpoint, config, ctx)
    scales = _scales(model, formats, graph, dataset, config, ctx)
    _report_float_layers(reasons_for_float(model, config, graph, scales.layers), scales)
    _check_quantizers_run(checkpoint.evolve(quantization=scales))
    components = quantize_components(checkpoint, config, dataset, ctx)
    checkpoint = checkpoint.evolve(component_quantization={**checkpoint.component_quantization, **components})
    if config.bounds:
        scales = within_bounds(checkpoint, scales, dataset, config.bounds, ctx)
    if config.svdquant:
        scales = with_svdquant(model, scales, config.svdquant.rank)
    quantized = checkpoint.evolve(quantization=scales)
    if config.gptq:
        student = fake_quantized(quantized.evolve(model=quantized.clone_model().float()))
        visited = trajectories_of(quantized, config, ctx, student)
        quantized = round_weights(quantized, student, visited, config.gptq.samples, ctx)
    if config.qat:
        return qat(quantized, dataset, config.qat, config.batch, ctx)
    if corrects_output(config, model):
        return with_output_corrections(quantized, model, dataset.conditioning, config.samples, config.batch, ctx.notes)
    return quantized


def check_keeps_sparsity(checkpoint: Checkpoint, config: QuantizeConfig) -> None:
    """Raise InvalidInputError for a method that would fill the zeros of 2:4 sparse layers."""
    low_rank = config.qat is not None and config.qat.updates == "low_rank"
    methods = {"gptq": config.gptq, "svdquant": config.svdquant, "qat.updates = low_rank": low_rank}
    filling = next((name for name, used in methods.items() if used), None)
    if checkpoint.sparse_layers and filling is not None:
        raise InvalidInputError(
            f"quantize: {filling} changes the weights that are zero in the {len(checkpoint.sparse_layers)} layers that "
            "prune made 2:4 sparse; remove it, or the prune stage of kind sparsity"
        )


def _scales(
    model: nn.Module,
    formats: dict[str, str],
    graph: LayerGraph,
    dataset: TrajectoryDataset,
    config: QuantizeConfig,
    ctx: Context,
) -> Quantization:
    """Return the formats and scales of the float `model`."""
    outputs = quantized_outputs(model, graph, formats, config)
    smooth: dict[str, torch.Tensor] = {}
    if config.smoothquant or config.split_concats:
        smooth = smoothing_vectors(dataset, graph, formats, config)
    if config.awq:
        smooth |= awq_vectors(dataset, graph, formats, config.awq.samples, ctx.seed)
    amax = calibrate(dataset, formats, outputs, smooth, config)
    # a smoothed layer quantizes a scaled copy of the concatenated tensor, so its input scale is its own
    amax |= unify_scales(graph, {key: a for key, a in amax.items() if key.removesuffix(".input") not in smooth})
    others = {name: kind for name, kind in formats.items() if kind != config.format}
    unscaled = [name for name in formats if f"{name}.weight" not in amax]
    return Quantization(config.format, amax, others, smooth).without(unscaled)


def _report_float_layers(reasons: Mapping[str, str], scales: Quantization) -> None:
    """Log the number of layers in each format, and in one line the layers that stay in float and why.

    Raises:
        InvalidInputError: No layer is quantized.
    """
    if not scales.layers:
        raise nothing_quantized(scales.format, reasons)
    kinds = list(scales.layer_formats.values())
    logger.info(", ".join(f"{kinds.count(kind)} layers in {kind}" for kind in FORMATS if kind in kinds))
    if reasons:
        logger.info(f"kept in float: {described(reasons)}")


def _check_quantizers_run(quantized: Checkpoint) -> None:
    """Raise InvalidInputError if fake quantization is bypassed: its error would be that of the float model."""
    assert quantized.quantization is not None
    model, spec = fake_quantized(quantized), small_spec(quantized.model, quantized.spec)
    network = TorchNetwork(model, spec)
    ran = quantizers_that_ran(model, lambda: network.run(dummy_inputs(network, spec, 1)))
    bypassed = sorted(set(quantized.quantization.amax) - ran)
    if bypassed:
        names = sorted({key.rpartition(".")[0] for key in bypassed})
        raise InvalidInputError(
            f"quantize: fake quantization of {', '.join(names)} does not run in torch, so its error is not measured; "
            f"keep {'them' if len(names) > 1 else 'it'} in float with ignored_layers: [{', '.join(names)}]"
        )


def trajectories_of(
    checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context, student: nn.Module | None = None
) -> TrajectoryDataset:
    """Return the trajectories of the checkpoint's float model, or of its fake-quantized `student`.

    They are recorded if a method reads them again.
    """
    model = checkpoint.model if student is None else student
    facts = [checkpoint.hash, config.model_dump(mode="json"), ctx.data.hash if ctx.data else None]
    read_again = (config.smoothquant, config.split_concats, config.awq, config.bounds, config.qat)
    with_energies = config.qat and config.qat.feature_weight and student is None
    return TrajectoryDataset(
        model,
        checkpoint.spec,
        ctx.conditions,
        samples=config.samples,
        trained_on=config.qat.trajectories if config.qat and student is None else 0,
        batch=config.batch,
        work=ctx.work if student is None else ctx.work / "quantized",
        run=json.dumps(facts),
        recorded=student is not None or any(map(bool, read_again)),
        keeps_final=student is None and DECODER in component_formats(checkpoint, config),
        blocks=tuple(blocks_left(model, model)) if with_energies else (),
    )
