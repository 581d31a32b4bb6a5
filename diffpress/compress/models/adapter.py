"""Family adapters: everything the stages need to know about one denoiser class, so that no stage names a family.

An adapter is a module with the members of `Adapter`. Adding a family takes one file and one line in `ADAPTERS`, under
the name of its diffusers class. Optional member:

    add_guidance_input_(model) -> config entries that changed; adds the guidance weight as an input of the network
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
    """What the stages need to know about a denoiser class; `RESIZABLE`: whether height and width may vary."""

    RESIZABLE: bool

    def describe(self, layout: Layout) -> Description:
        """Return sample shape, conditioning, default steps and guidance, read from the pipeline's configs."""
        ...

    def forward(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Evaluate the network on inputs by name (see `dummy_inputs`); returns [B, C, H, W]."""
        ...

    def blocks(self, model: nn.Module) -> list[str]:
        """Return the names of the modules whose outputs feature distillation compares."""
        ...

    def sensitive_layers(self, model: nn.Module) -> list[str]:
        """Return the names of the layers that stay in high precision by default."""
        ...

    def skip_concats(self, model: nn.Module) -> list[str]:
        """Return the names of the modules that read a concatenation of hidden states and a skip connection."""
        ...

    def residual_outputs(self, model: nn.Module) -> list[str]:
        """Return the names of the modules that write the residual stream and its skip connections."""
        ...

    def cache_cuts(self, model: nn.Module) -> list[str]:
        """Return the names of the modules whose output can be cached for later steps."""
        ...

    def attentions(self, model: nn.Module) -> list[Coupled]:
        """Return the heads of each attention; pruning removes complete heads."""
        ...

    def coupled(self, model: nn.Module) -> list[Coupled] | None:
        """Return the inner widths that pruning may shrink; None: use the dependency graph."""
        ...

    def fixed(self, model: nn.Module) -> list[str]:
        """Return the names of layers whose output widths are never pruned; only used if `coupled` returns None."""
        ...

    def refresh_(self, model: nn.Module) -> None:
        """Update size attributes that modules store to the present layer widths."""
        ...


ADAPTERS: dict[str, Any] = {
    "UNet2DModel": unet2d,
    "UNet2DConditionModel": unet2d_condition,
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
}


def adapter_for(model: nn.Module) -> Adapter:
    """Return the adapter of a model's class; unknown classes get `any_module`."""
    bare = getattr(model, "module", model) if isinstance(model, DistributedDataParallel) else model
    return cast(Adapter, ADAPTERS.get(type(bare).__name__, any_module))


def timestep_dtype(spec: DenoiserSpec) -> torch.dtype:
    """Return int64 for discrete-time models without text conditioning, as they were trained; else float32."""
    integer = spec.prediction != "flow" and spec.conditioning.kind != "text" and spec.spacing.integer
    return torch.int64 if integer else torch.float32


def dummy_inputs(spec: DenoiserSpec, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random inputs with the names, shapes and dtypes that the model expects.

    sample float32 [B, C, H, W], timestep int64 or float32 [B], and depending on the conditioning: class_labels int64
    [B], text inputs float32 [B, ...], guidance float32 [B].
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
    """Return the dynamic axes of every input, named as for ONNX export: batch, steps, height, width, sequence."""
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in dummy_inputs(spec, 1)}
    if spec.conditioning.kind == "text":
        # diffusers pipelines pass one timestep for a batch: the graph broadcasts it only if the axis names differ
        axes["timestep"] = {0: "steps"}
    if adapter_for(model).RESIZABLE and not fixed_size:
        axes["sample"] |= {2: "height", 3: "width"}
    for name, entry in spec.conditioning.inputs.items():
        if len(entry.shape) == 2 or name.endswith("_mask"):
            axes[name] |= {1: "sequence"}
    return axes
