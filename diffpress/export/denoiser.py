"""Checkpoint -> the denoiser's graphs for all targets of a bundle.

denoiser.onnx           the portable graph, which every engine on the CPU can run
denoiser.float.onnx     before quantization, for engines in which integers are slower on this machine
denoiser.openvino.onnx  fewer layers quantized, if OpenVINO cannot run the portable graph (export/engine_variants.py)
denoiser.tensorrt.onnx  another Q/DQ form, from which TensorRT engines of a quantized model are built
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.config import ExportConfig
from diffpress.compress.models.kept_indices import kept_of_unsaved
from diffpress.export.graph.model import Graph
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.lowering import PassContext, lower
from diffpress.export.passes.fold_timesteps import foldable_timesteps, folded_layers
from diffpress.export.passes.half_precision import FLOAT, kept_modules
from diffpress.export.targets.precision import precision_of
from diffpress.export.targets.tensorrt import ENGINE as TENSORRT
from diffpress.export.verify.reference import ParityCase, parity_case_for
from diffpress.export.verify.sparsity import check_sparsity
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_size import resized

logger = logging.getLogger(__name__)

PORTABLE = "denoiser.onnx"


@dataclass(frozen=True)
class TargetGraph:
    """A graph of the denoiser for some engines.

    Attributes:
        file: Its file in the bundle.
        graph: The graph.
        quantization: What it computes; None for float.
        float_precision: Precision of its float layers.
        engines: Engines that run it instead of denoiser.onnx (names of diffpress.runtime.engines).
    """

    file: str
    graph: Graph
    quantization: Quantization | None
    float_precision: str = FLOAT
    engines: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """Precision for the manifest: 'int8', 'fp16', 'int8+fp16'."""
        rest = "" if self.quantization is None or self.float_precision == FLOAT else f"+{self.float_precision}"
        return precision_of(self.quantization, self.float_precision) + rest


@dataclass(frozen=True)
class Denoiser:
    """The graphs of a checkpoint's denoiser.

    Attributes:
        checkpoint: What the graphs compute: at the exported size, folded layers without quantization.
        case: How the graphs are verified and timed.
        traced: The graph of the torch model, in float32.
        float_graph: The same with timesteps folded, if that was chosen.
        portable: denoiser.onnx.
        variants: Graphs that some engines run instead.
        sparse_layers: Layers whose weights in denoiser.onnx are 2:4 sparse.
    """

    checkpoint: Checkpoint
    case: ParityCase
    traced: Graph
    float_graph: Graph
    portable: TargetGraph
    variants: tuple[TargetGraph, ...] = ()
    sparse_layers: tuple[str, ...] = ()

    @property
    def features(self) -> list[str]:
        """Names of the features that the graphs return besides the output, for a plan with cached steps."""
        return [value.name for value in self.traced.proto.graph.output][1:]

    def reverted(self, engines: Sequence[str]) -> Denoiser:
        """Return the denoiser of which these engines run the float graph."""
        if not engines:
            return self
        float_graph = TargetGraph("denoiser.float.onnx", self.float_graph, None, engines=tuple(sorted(engines)))
        others = tuple(variant for variant in self.variants if not set(variant.engines) <= set(engines))
        return replace(self, variants=(float_graph, *others))

    def graph_for(self, engine: str) -> TargetGraph:
        """Return the graph that the engine runs."""
        return next((variant for variant in self.variants if engine in variant.engines), self.portable)


def lower_denoiser(checkpoint: Checkpoint, config: ExportConfig, traced: Graph | None = None) -> Denoiser:
    """Return the denoiser's graphs for the targets of `config`; `traced` is the result of `to_onnx`, if it exists.

    Raises:
        InvalidInputError: If the model cannot be traced or rewritten with these settings.
    """
    cache = checkpoint.spec.plan.cache
    check_cached_steps(None if cache is None else cache.kind, config)
    fixed_size = config.size is not None
    if config.size is not None:
        check_size(checkpoint, config.size)
        checkpoint = checkpoint.evolve(spec=resized(checkpoint.spec, config.size))
    timesteps = foldable_timesteps(checkpoint.spec) if config.fixed_timesteps else ()
    traced = to_onnx(checkpoint.model, checkpoint.spec, fixed_size) if traced is None else traced
    float_graph = lower(traced, "float", PassContext(timesteps=timesteps))
    if timesteps:
        checkpoint = _restricted(checkpoint, folded_layers(traced, float_graph))
    if checkpoint.quantization is not None and not checkpoint.quantization.layers:
        logger.warning("no layer of the checkpoint is quantized: its graphs are exported in float")
        plan = checkpoint.spec.plan.without_corrections
        checkpoint = checkpoint.evolve(spec=checkpoint.spec.with_plan(plan), quantization=None)
    quantization, keep = checkpoint.quantization, kept_modules(checkpoint.model, config.precision)
    # ONNX Runtime has no integer kernels with fp16 scales: the float layers of a quantized model stay fp32 on the CPU
    precision = config.precision if quantization is None else FLOAT
    context = PassContext(quantization, precision, keep)
    portable = TargetGraph(PORTABLE, lower(float_graph, "cpu", context), quantization, precision)
    variants: tuple[TargetGraph, ...] = ()
    if TENSORRT in config.targets and quantization is not None:
        context = PassContext(quantization, config.precision, keep, name="denoiser for TensorRT")
        graph = lower(float_graph, "tensorrt", context)
        variants = (TargetGraph("denoiser.tensorrt.onnx", graph, quantization, config.precision, (TENSORRT,)),)
    sparse, *_ = (check_sparsity(one.graph, checkpoint.sparse_layers, one.file) for one in (portable, *variants))
    case = parity_case_for(checkpoint.model, checkpoint.spec, fixed_size)
    return Denoiser(checkpoint, case, traced, float_graph, portable, variants, sparse)


def check_size(checkpoint: Checkpoint, size: tuple[int, int]) -> None:
    """Raise InvalidInputError if another size makes the network compute the position table that was pruned anew."""
    if size != checkpoint.spec.image_size and kept_of_unsaved(checkpoint.kept_indices, checkpoint.model):
        raise InvalidInputError(
            "size: the residual stream was pruned, and with it a position table that holds for the model's own size "
            "alone; leave size out"
        )


def check_cached_steps(kind: str | None, config: ExportConfig) -> None:
    """Raise InvalidInputError for export settings that do not go with a step cache of this kind; None for none."""
    if kind != "features":
        return
    refused = {
        **{f"target {name}": name in config.targets for name in (TENSORRT, "sampler", "triton", "web")},
        "fixed_timesteps": config.fixed_timesteps,
        f"precision {config.precision}": config.precision != FLOAT,
    }
    for what, is_set in refused.items():
        if is_set:
            raise InvalidInputError(
                f"{what} does not go with a step cache of kind 'features', whose graphs run in fp32 and int8 in "
                "onnxruntime and openvino; remove one of them, or use kind 'forecast'"
            )


def _restricted(checkpoint: Checkpoint, folded: set[str]) -> Checkpoint:
    """Return the checkpoint that accepts only its plan's timesteps and computes the folded layers in float."""
    if not folded:
        logger.info("fixed_timesteps: no layer depends on the timestep alone; the graph accepts any timestep")
        return checkpoint
    plan = checkpoint.spec.plan
    logger.info(f"fixed_timesteps: {len(folded)} layers became tables of {plan.steps} timesteps")
    spec = replace(checkpoint.spec, fixed_timesteps=plan.timesteps)
    quantization = checkpoint.quantization and checkpoint.quantization.without(folded)
    return checkpoint.evolve(spec=spec, quantization=quantization)
