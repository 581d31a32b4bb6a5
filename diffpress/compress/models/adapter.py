"""Family adapters: what the passes must know about one kind of denoiser, so that no pass names a family.

An adapter is a module with what follows; adding a family is one file and one line in `ADAPTERS`, under the name of its
diffusers class.

    describe(layout)       -> the shape of a sample, the conditioning, the usual steps and guidance (description.py)
    forward(model, inputs) -> out_sample [B, C, H, W]   inputs named as the ecosystem names them
    blocks(model)          -> names of the modules whose outputs feature distillation compares
    fragile(model)         -> names of layers that compute in high precision by default
    skip_concats(model)      -> names of the modules that read a skip connection beside the stream
    trunk(model)           -> names of the modules that write the stream and the skips that are joined to it
    cache_cuts(model)      -> names of the modules whose output can be kept for later steps, skipping what made it
    attentions(model)      -> the heads of each attention, which pruning removes whole
    coupled(model)         -> inner widths that pruning may shrink, or None: the dependency graph finds them, and then
    fixed(model)           -> names of layers whose output widths are never pruned (only asked for in that case)
    refresh_(model)        -> bring stored static attributes in line with the layers' widths
    add_guidance_input_(model) -> the settings that changed; only where the kind has room for the weight as an input
    RESIZABLE              whether height and width may change from call to call
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffpress.compress.models.description import Description
from diffpress.compress.models.diffusers_blocks import Coupled
from diffpress.compress.models.families import any_module, dit, flux, pixart, sd3, unet2d, unet2d_condition
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.spec import DenoiserSpec


class Adapter(Protocol):
    RESIZABLE: bool

    def describe(self, layout: Layout) -> Description: ...
    def forward(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor: ...
    def blocks(self, model: nn.Module) -> list[str]: ...
    def sensitive_layers(self, model: nn.Module) -> list[str]: ...
    def skip_concats(self, model: nn.Module) -> list[str]: ...
    def residual_outputs(self, model: nn.Module) -> list[str]: ...
    def cache_cuts(self, model: nn.Module) -> list[str]: ...
    def attentions(self, model: nn.Module) -> list[Coupled]: ...
    def coupled(self, model: nn.Module) -> list[Coupled] | None: ...
    def fixed(self, model: nn.Module) -> list[str]: ...
    def refresh_(self, model: nn.Module) -> None: ...


ADAPTERS: dict[str, Any] = {
    "UNet2DModel": unet2d,
    "UNet2DConditionModel": unet2d_condition,
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
}


def adapter_for(model: nn.Module) -> Adapter:
    bare = getattr(model, "module", model) if isinstance(model, DistributedDataParallel) else model
    return cast(Adapter, ADAPTERS.get(type(bare).__name__, any_module))


def timestep_dtype(spec: DenoiserSpec) -> torch.dtype:
    """Whole timesteps for discrete-time models in pixel space, as they were trained; else float32."""
    whole = spec.prediction != "flow" and spec.conditioning.kind != "text" and spec.spacing.integer
    return torch.int64 if whole else torch.float32


def dummy_inputs(spec: DenoiserSpec, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of the right names, shapes and dtypes for any family.

    sample float32 [B, C, H, W], timestep int64 or float32 [B], and by the conditioning: class_labels int64 [B], the
    text inputs float32 [B, ...], guidance float32 [B].
    """
    generator = torch.Generator().manual_seed(seed)
    conditioning = spec.conditioning
    inputs = {
        "sample": torch.randn(batch, *spec.sample_shape, generator=generator),
        "timestep": torch.randint(0, len(spec.schedule), (batch,), generator=generator).to(timestep_dtype(spec)),
    }
    if conditioning.kind == "class":
        inputs["class_labels"] = torch.randint(0, conditioning.classes, (batch,), generator=generator)
    for name, entry in conditioning.inputs.items():
        drawn = torch.randn(batch, *entry.shape, generator=generator)
        inputs[name] = torch.ones_like(drawn) if entry.is_plain else drawn
    if conditioning.guidance_input:
        inputs["guidance"] = torch.full((batch,), spec.plan.guidance)
    return inputs


def dynamic_axes(model: nn.Module, spec: DenoiserSpec, fixed_size: bool = False) -> dict[str, dict[int, str]]:
    """The dimensions of every input that may change from call to call, by name: batch, height, width, sequence."""
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in dummy_inputs(spec, 1)}
    if spec.conditioning.kind == "text":
        # pipelines of diffusers' making pass one timestep for a batch: the graph spreads it, if the names differ
        axes["timestep"] = {0: "steps"}
    if adapter_for(model).RESIZABLE and not fixed_size:
        axes["sample"] |= {2: "height", 3: "width"}
    for name, entry in spec.conditioning.inputs.items():
        if len(entry.shape) == 2 or name.endswith("_mask"):
            axes[name] |= {1: "sequence"}
    return axes
