"""The adapters of all denoiser families, and the inputs that their networks take.

Adding a family takes one file in compress/models/families/ and one line here, under the name of its diffusers class.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffpress.compress.models.families import dit, flux, pixart, sd3, unet2d, unet2d_condition
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.models.feature_cuts import Cut, check_cut
from diffpress.runtime.conditioning import MASKED_IMAGE
from diffpress.runtime.spec import DenoiserSpec

ADAPTERS: dict[str, Adapter] = {
    "UNet2DModel": unet2d.ADAPTER,
    "UNet2DConditionModel": unet2d_condition.ADAPTER,
    "DiTTransformer2DModel": dit.ADAPTER,
    "PixArtTransformer2DModel": pixart.ADAPTER,
    "SD3Transformer2DModel": sd3.ADAPTER,
    "FluxTransformer2DModel": flux.ADAPTER,
}
ANY_MODULE = Adapter()
SMALL_SIDE = 16  # cells


def adapter_for(model: nn.Module) -> Adapter:
    """Return the adapter of a model's diffusers class; other classes get the defaults, whatever their names are."""
    bare = getattr(model, "module", model) if isinstance(model, DistributedDataParallel) else model
    if not type(bare).__module__.startswith("diffusers."):
        return ANY_MODULE
    return ADAPTERS.get(type(bare).__name__, ANY_MODULE)


def cut_of(model: nn.Module, name: str = "") -> Cut:
    """Return the model's cut of that name for a step cache, see `cut_name`."""
    return adapter_for(model).cache_cuts(model)[cut_name(model, name)]


def cut_name(model: nn.Module, name: str = "") -> str:
    """Return the name if it is a cut of the model; the first one it has for ''.

    Raises:
        InvalidInputError: The family has no such cut; the message lists those it has.
    """
    cuts = adapter_for(model).cache_cuts(model)
    able = [family for family, adapter in ADAPTERS.items() if adapter.cache_cuts is not ANY_MODULE.cache_cuts]
    return check_cut(list(cuts), name, type(model).__name__, able)


def timestep_dtype(spec: DenoiserSpec) -> torch.dtype:
    """Return int64 for models that take integer timesteps, as they were trained; else float32."""
    return torch.int64 if spec.takes_integers else torch.float32


def dummy_inputs(spec: DenoiserSpec, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random inputs with the names, shapes and dtypes that the model expects.

    sample float32 [B, ...], timestep int64 or float32 [B], and depending on the conditioning: class_labels int64 [B],
    text inputs and masked_image float32 [B, ...], tensors float32 or int64 [B, ...], guidance float32 [B]. Integer
    tensors are zeros: their valid range is not known.
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
    for name, tensor in conditioning.tensors.items():
        shape = (batch, *tensor.shape)
        is_integer = tensor.dtype == "int64"
        inputs[name] = torch.zeros(shape, dtype=torch.int64) if is_integer else torch.randn(shape, generator=generator)
    if conditioning.inpainting:
        inputs[MASKED_IMAGE] = torch.randn(batch, *spec.masked_image_shape, generator=generator)
    if conditioning.guidance_input:
        inputs["guidance"] = torch.full((batch,), spec.plan.guidance)
    return inputs


def small_spec(model: nn.Module, spec: DenoiserSpec) -> DenoiserSpec:
    """Return the spec at a small size, for evaluations whose values do not matter.

    It has sides of about SMALL_SIDE cells, or those of the spec if they are smaller or the model is not resizable.
    """
    if not adapter_for(model).resizable:
        return spec
    side = max(2, SMALL_SIDE // spec.size_multiple) * spec.size_multiple
    channels, height, width = spec.sample_shape
    return replace(spec, sample_shape=(channels, min(side, height), min(side, width)))


def dynamic_axes(model: nn.Module, spec: DenoiserSpec, fixed_size: bool = False) -> dict[str, dict[int, str]]:
    """Return the dynamic axes of every input, named as for ONNX export: batch, steps, height, width, sequence."""
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in dummy_inputs(spec, 1)}
    if spec.conditioning.kind == "text":
        # diffusers pipelines pass one timestep for a batch: the graph broadcasts it only if the axis names differ
        axes["timestep"] = {0: "steps"}
    if adapter_for(model).resizable and not fixed_size:
        axes["sample"] |= {2: "height", 3: "width"}
        if MASKED_IMAGE in axes:
            axes[MASKED_IMAGE] |= {2: "height", 3: "width"}
    for name, entry in spec.conditioning.inputs.items():
        if len(entry.shape) == 2 or name.endswith("_mask"):
            axes[name] |= {1: "sequence"}
    return axes
