"""What the stages need to know about a denoiser class: a record of functions, so that no stage names a family.

A family is one file that ends with `ADAPTER = Adapter(...)` and one line in `ADAPTERS` (compress/models/adapter.py). It
gives only what differs from the defaults below, which fit any `nn.Module` called as
module(sample, timestep[, class_labels][, name=tensor ...]) -> tensor. Nothing is known about the structure of such a
module, so they are conservative: the first and the last layer stay in high precision, the direct children are the
blocks, and no attention heads are pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffpress.compress.models.description import Description
from diffpress.compress.models.diffusers_blocks import Coupled
from diffpress.compress.models.feature_cuts import Cut
from diffpress.compress.models.removed_blocks import Removable
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.errors import InvalidInputError

# layers among which the first and the last are looked for
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, nn.Linear)


def _describe(layout: Layout) -> Description:
    raise InvalidInputError(f"{layout.folder}: the adapter of {layout.kind} cannot read it: it has no `describe`")


def _forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    positional = [inputs[name] for name in ("sample", "timestep", "class_labels") if name in inputs]
    named = {name: value for name, value in inputs.items() if name not in ("sample", "timestep", "class_labels")}
    out: torch.Tensor = model(*positional, **named)
    return out


def _children(model: nn.Module) -> list[str]:
    """Return the direct children that have parameters."""
    return [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def _first_and_last_layer(model: nn.Module) -> list[str]:
    layers = _layers(model)
    return sorted({*layers[:1], *layers[-1:]})


def _last_layer(model: nn.Module) -> list[str]:
    return _layers(model)[-1:]


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, WEIGHTED)]


def _none(model: nn.Module) -> list[Any]:
    return []


def _no_cuts(model: nn.Module) -> dict[str, Cut]:
    return {}


def _unknown(model: nn.Module) -> None:
    return None


def _do_nothing_(model: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Adapter:
    """The functions of one denoiser family.

    Attributes:
        describe: Returns sample shape, conditioning, default steps and guidance, read from the pipeline's configs. A
            custom module brings its own spec instead.
        forward: Evaluates the network on inputs by name (see `dummy_inputs`); returns [B, ...] like `sample`.
        resizable: Whether height and width may vary.
        blocks: Names of the modules whose outputs feature distillation compares.
        sensitive_layers: Names of the layers that stay in high precision by default.
        residual_outputs: Names of the modules that write the residual stream and its skip connections.
        attentions: Heads of each attention; pruning removes complete heads.
        coupled: Inner widths that pruning may shrink; None: all widths are found by a trace of the network's channels.
        residual: Whether the width of the residual stream shrinks as well if a recipe does not say.
        tied_outputs: Lists of layers that must write the same channels, although no operation of the network shows it.
        fixed: Names of layers whose output widths are never pruned. A family that names some prunes the residual stream
            over torch-pruning's dependency graph, the others by a trace of the network's channels.
        removable_blocks: Blocks that depth pruning may remove; None: members of lists of modules, found by running it.
        refresh_: Updates size attributes that modules store to the present layer widths.
        cache_cuts: Where the network may be split for a step cache, by name, the cheapest cached evaluation first;
            empty where it cannot be.
        add_guidance_input_: Adds the guidance weight as an input of the network; returns the config entries that
            changed. None: this family does not support it.
    """

    describe: Callable[[Layout], Description] = _describe
    forward: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor] = _forward
    resizable: bool = False
    blocks: Callable[[nn.Module], list[str]] = _children
    sensitive_layers: Callable[[nn.Module], list[str]] = _first_and_last_layer
    residual_outputs: Callable[[nn.Module], list[str]] = _none
    attentions: Callable[[nn.Module], list[Coupled]] = _none
    coupled: Callable[[nn.Module], list[Coupled] | None] = _unknown
    residual: bool = False
    tied_outputs: Callable[[nn.Module], list[list[str]]] = _none
    fixed: Callable[[nn.Module], list[str]] = _last_layer
    removable_blocks: Callable[[nn.Module], list[Removable]] | None = None
    refresh_: Callable[[nn.Module], None] = _do_nothing_
    cache_cuts: Callable[[nn.Module], dict[str, Cut]] = _no_cuts
    add_guidance_input_: Callable[[nn.Module], dict[str, Any]] | None = None
