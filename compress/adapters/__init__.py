"""Family adapters: what the passes must know about one kind of denoiser, so that no pass names a family.

An adapter is a module with the functions below; adding a family is one file and one line in `ADAPTERS`.

    forward(model, inputs) -> out_sample [B, C, H, W]   inputs named as the ecosystem names them
    blocks(model)          -> names of the modules whose outputs feature distillation compares
    fragile(model)         -> names of layers that compute in high precision by default
    fixed(model)           -> names of layers whose output widths are never pruned
    attentions(model)      -> attention modules whose whole heads can be removed
    refresh_(model)        -> bring stored static attributes in line with the layers' widths
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compress.adapters import any_module, unet2d
from runtime.spec import DenoiserSpec


class Adapter(Protocol):
    def forward(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor: ...
    def blocks(self, model: nn.Module) -> list[str]: ...
    def fragile(self, model: nn.Module) -> list[str]: ...
    def fixed(self, model: nn.Module) -> list[str]: ...
    def attentions(self, model: nn.Module) -> list[Any]: ...
    def refresh_(self, model: nn.Module) -> None: ...


ADAPTERS: dict[str, Any] = {
    "UNet2DModel": unet2d,
}


def adapter_for(model: nn.Module) -> Adapter:
    bare = getattr(model, "module", model) if isinstance(model, DistributedDataParallel) else model
    return cast(Adapter, ADAPTERS.get(type(bare).__name__, any_module))


def example_inputs(spec: DenoiserSpec, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of the right names, shapes and dtypes: sample float32 [B, C, H, W], timestep int64 or
    float32 [B], class_labels int64 [B] where the model has classes."""
    generator = torch.Generator().manual_seed(seed)
    top = len(spec.schedule)
    inputs = {
        "sample": torch.randn(batch, *spec.sample_shape, generator=generator),
        "timestep": torch.randint(0, top, (batch,), generator=generator),
    }
    if spec.prediction == "flow":
        inputs["timestep"] = inputs["timestep"].float()
    if spec.conditioning.kind == "class":
        inputs["class_labels"] = torch.randint(0, spec.conditioning.classes, (batch,), generator=generator)
    return inputs
