"""Family adapters: the defaults fit any module, and the modules that an adapter names exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, LatentConsistencyModelPipeline
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import ADAPTERS, ANY_MODULE, adapter_for, dummy_inputs, dynamic_axes
from diffpress.compress.models.families import flux
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.models.families.unet2d_condition import guidance_embedding
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_size import resized
from diffpress.runtime.network_inputs import dummy_conditioning

KINDS = ["ldm", "sd", "sdxl", "lcm", "dit", "pixart-alpha", "sd3.5", "flux", "flux-schnell"]


@pytest.fixture
def checkpoint(tiny_folder: Callable[..., Path]) -> Callable[[str], Checkpoint]:
    """Load a tiny checkpoint of a kind; Flux at a smaller size."""

    def load(kind: str) -> Checkpoint:
        found = load_checkpoint(tiny_folder(kind))
        return found.evolve(spec=resized(found.spec, (32, 32))) if kind.startswith("flux") else found

    return load


# --- the contract ----------------------------------------------------------------------------------------------


def test_every_family_is_a_frozen_record_of_functions_under_the_name_of_its_diffusers_class() -> None:
    for name, adapter in ADAPTERS.items():
        assert issubclass(getattr(diffusers, name), nn.Module)
        assert all(getattr(adapter, own) is not getattr(ANY_MODULE, own) for own in ("describe", "forward"))
        with pytest.raises(FrozenInstanceError):
            adapter.resizable = True  # type: ignore[misc]


def test_the_defaults_fit_any_module() -> None:
    model = nn.ModuleDict(
        {"stem": nn.Conv2d(1, 4, 1), "act": nn.ReLU(), "inner": nn.Linear(4, 4), "out": nn.Linear(4, 1)}
    )
    adapter = adapter_for(model)
    assert adapter is ANY_MODULE and not adapter.resizable and adapter.add_guidance_input_ is None
    assert adapter.blocks(model) == ["stem", "inner", "out"]
    assert adapter.sensitive_layers(model) == ["out", "stem"] and adapter.fixed(model) == ["out"]
    assert not adapter.residual_outputs(model) and not adapter.attentions(model) and adapter.coupled(model) is None


def test_the_default_forward_passes_class_labels_only_if_there_are_any() -> None:
    class Sum(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return torch.stack(inputs).sum(0)

    one = torch.ones(2)
    inputs = {"sample": one, "timestep": 2 * one}
    assert ANY_MODULE.forward(Sum(), inputs).tolist() == [3.0, 3.0]
    assert ANY_MODULE.forward(Sum(), inputs | {"class_labels": 4 * one}).tolist() == [7.0, 7.0]


def test_a_family_without_describe_is_refused_in_one_line(tiny_folder: Callable[..., Path], monkeypatch: Any) -> None:
    monkeypatch.setitem(ADAPTERS, "DiTTransformer2DModel", Adapter())
    with pytest.raises(InvalidInputError, match="the adapter of DiTTransformer2DModel cannot read it"):
        load_checkpoint(tiny_folder("dit"))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_named_by_an_adapter_are_in_the_model(kind: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    model = checkpoint(kind).model
    adapter, modules = adapter_for(model), dict(model.named_modules())
    lists = {name: getattr(adapter, name)(model) for name in ("blocks", "sensitive_layers", "residual_outputs")}
    for name, found in lists.items():
        assert set(found) <= set(modules) and len(set(found)) == len(found), name
    assert lists["blocks"] and lists["sensitive_layers"]
    assert bool(lists["residual_outputs"]) == (kind in ("ldm", "sd", "sdxl", "lcm"))
    kinds = {type(modules[name]) for name in lists["sensitive_layers"]}
    assert kinds <= {nn.Linear, nn.Conv2d, nn.Embedding}
    weighted = [name for name, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(lists["sensitive_layers"]) < len(weighted), "something must be left to quantize"
    if adapter.coupled(model) is None:
        assert adapter.fixed(model) and set(adapter.fixed(model)) <= set(modules)


@pytest.mark.parametrize("kind", KINDS)
def test_all_blocks_run_in_order_in_every_forward(kind: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    one = checkpoint(kind)
    adapter, seen = adapter_for(one.model), []
    for name in adapter.blocks(one.model):
        module = one.model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        out = adapter.forward(one.model, dummy_inputs(one.spec, 2))
    assert seen == adapter.blocks(one.model)
    assert out.shape == (2, *one.spec.sample_shape) and out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_reaches_the_output(kind: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    one = checkpoint(kind)
    adapter, inputs = adapter_for(one.model), dummy_inputs(one.spec, 2)
    with torch.no_grad():
        before = adapter.forward(one.model, inputs)
        for name, value in inputs.items():
            other = value * 0.5 if value.is_floating_point() else (value + 40) % 900
            if name == "encoder_attention_mask":
                other = (torch.arange(value.shape[1]) < 3).float().expand_as(value)
            after = adapter.forward(one.model, {**inputs, name: other})
            assert not torch.equal(before, after), name


@pytest.mark.parametrize("kind", KINDS)
def test_dummy_inputs_and_conditioning_have_the_shapes_of_the_spec(
    kind: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    spec = checkpoint(kind).spec
    inputs, conditions = dummy_inputs(spec, 3), dummy_conditioning(spec, 3)
    assert set(conditions.cond) == set(inputs) - {"sample", "timestep", "guidance"}
    for name, array in conditions.cond.items():
        assert array.shape == tuple(inputs[name].shape)
    assert ("guidance" in inputs) == (kind in ("lcm", "flux"))
    integer = inputs["timestep"].dtype == torch.int64
    assert integer == (kind in ("ldm", "dit"))


@pytest.mark.parametrize("kind", KINDS)
def test_height_and_width_are_dynamic_if_the_model_is_resizable(
    kind: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    one = checkpoint(kind)
    axes = dynamic_axes(one.model, one.spec)
    assert set(axes) == set(dummy_inputs(one.spec, 1)) and all(0 in dims for dims in axes.values())
    resizable = adapter_for(one.model).resizable
    assert (set(axes["sample"]) == {0, 2, 3}) == resizable
    assert set(dynamic_axes(one.model, one.spec, fixed_size=True)["sample"]) == {0}
    for name, entry in one.spec.conditioning.inputs.items():
        sequence = len(entry.shape) == 2 or name == "encoder_attention_mask"
        assert (1 in axes[name]) == sequence, name
    if resizable:
        channels, height, width = one.spec.sample_shape
        inputs = dummy_inputs(one.spec, 1) | {"sample": torch.zeros(1, channels, 2 * height, width)}
        with torch.no_grad():
            out = adapter_for(one.model).forward(one.model, inputs)
        assert out.shape == inputs["sample"].shape


# --- Flux ------------------------------------------------------------------------------------------------------


def test_flux_packs_and_unpacks_cells_as_its_pipeline_does() -> None:
    sample = torch.randn(2, 16, 6, 4)
    tokens = flux.pack(sample)
    assert torch.equal(tokens, FluxPipeline._pack_latents(sample, *sample.shape))
    assert torch.equal(flux.unpack(tokens, 3, 2), sample)
    theirs = FluxPipeline._unpack_latents(tokens, height=6 * 8, width=4 * 8, vae_scale_factor=8)
    assert torch.equal(flux.unpack(tokens, 3, 2), theirs)


def test_flux_position_ids_are_those_of_its_pipeline() -> None:
    theirs = FluxPipeline._prepare_latent_image_ids(1, 3, 2, "cpu", torch.float32)
    assert torch.equal(flux.positions(3, 2, torch.zeros(1)), theirs)


# --- latent consistency models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 256])
def test_the_guidance_embedding_is_that_of_diffusers(width: int) -> None:
    weights = torch.tensor([0.0, 3.0, 7.5])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, weights, embedding_dim=width)
    np.testing.assert_array_equal(guidance_embedding(weights, width), theirs)
