"""Outputs of a network's blocks, and the distance between those of two networks.

Widths differ after pruning, so the output f of a block is compared through its energy map e = mean over channels of
f^2, as in attention transfer (Zagoruyko & Komodakis 2017). This needs no learned projection between the two widths
(projected_student.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.removed_blocks import removed_blocks
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec

Features = dict[str, torch.Tensor]

# layers of sequences whose outputs are [B, C, L]; all others write [B, tokens, C]
CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.GroupNorm, nn.InstanceNorm1d)


def energy_map(feature: torch.Tensor) -> torch.Tensor:
    """Return the energy map [B, H, W] of [B, C, H, W], [B, T, H, W] of [B, C, T, H, W] or [B, ...] of [B, ..., C]."""
    return feature.square().mean(channel_axis(feature))


def channel_axis(feature: torch.Tensor) -> int:
    """Return the axis of the channels: 1 in [B, C, H, W] and [B, C, T, H, W], else the last."""
    return 1 if feature.dim() >= 4 else -1


def relative_distance(values: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return |value - reference|^2 / |reference|^2, averaged over the blocks of `values`.

    Raises:
        InvalidInputError: There are no blocks.
    """
    if not values:
        raise InvalidInputError("distill: no block of the model returns a tensor to compare; set feature_weight: 0")
    distances = [
        torch.mean((value - references[name]) ** 2) / torch.mean(references[name] ** 2).clamp_min(1e-12)
        for name, value in values.items()
    ]
    return torch.stack(distances).mean()


def energy_distance(features: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the relative squared distance of the features' energy maps to `references`, averaged over blocks.

    `features` has at least the blocks of `references`, which are energy maps.

    Raises:
        InvalidInputError: The energy maps of a block have different shapes, so they cannot be compared.
    """
    energies = {name: energy_map(features[name]) for name in references}
    for name, reference in references.items():
        check_comparable(name, energies[name], reference)
    return relative_distance(energies, references)


def check_comparable(name: str, energies: torch.Tensor, reference: torch.Tensor) -> None:
    """Raise InvalidInputError if the energy maps of block `name` have another shape than the teacher's."""
    if energies.shape != reference.shape:
        raise InvalidInputError(
            f"distill: the output of block '{name}' has energy maps {list(energies.shape)}, the teacher's are "
            f"{list(reference.shape)}; set feature_weight: 0"
        )


def compared_blocks(teacher: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Return the blocks of a teacher whose outputs those of the checkpoint's model can be compared with.

    A block that was removed, or of which all is removed, only repeats the output of the one before. If blocks were
    removed, what is left may work at another resolution.
    """
    student, names = checkpoint.model, blocks_left(teacher, checkpoint.model)
    if not removed_blocks(student):
        return names
    theirs, ours = (dummy_features(model, checkpoint.spec, names) for model in (teacher, student))
    return [name for name in names if energy_map(theirs[name]).shape == energy_map(ours[name]).shape]


def dummy_features(model: nn.Module, spec: DenoiserSpec, blocks: Sequence[str]) -> Features:
    """Return the outputs [1, ...] of the named blocks on random inputs."""
    with torch.no_grad(), capture_features(model, blocks) as features:
        adapter_for(model).forward(model.eval(), dummy_inputs(spec, 1))
    return features


def blocks_left(teacher: nn.Module, student: nn.Module) -> list[str]:
    """Return the blocks of a teacher without those of which the student has no weights any more."""
    modules = dict(student.named_modules())
    names = adapter_for(teacher).blocks(teacher)
    return [name for name in names if name not in modules or any(True for _ in modules[name].parameters())]


@contextmanager
def capture_features(model: nn.Module, blocks: Sequence[str]) -> Iterator[Features]:
    """Collect the outputs of the named blocks in every forward pass inside the context.

    Raises:
        InvalidInputError: The model lacks a block, so that it cannot be compared with another that has it.
    """
    features: Features = {}
    modules = dict(getattr(model, "module", model).named_modules())  # DDP wraps the model
    lacking = next((name for name in blocks if name not in modules), None)
    if lacking is not None:
        raise InvalidInputError(
            f"distill: the student has no block '{lacking}' like the teacher; set feature_weight: 0"
        )
    with ExitStack() as stack:
        for name in blocks:
            stack.callback(modules[name].register_forward_hook(_store_output(features, name)).remove)
        yield features


def _store_output(features: Features, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: Any) -> None:
        if isinstance(output, tuple):
            # U-Net blocks return (hidden states, (skip, ...), ...), joint transformer blocks (text, hidden states)
            output = output[0] if isinstance(output[-1], tuple) or len(output) > 2 else output[-1]
        if not (isinstance(output, torch.Tensor) and output.is_floating_point()):
            return  # a block of a custom module may return anything
        features[name] = output.transpose(1, 2) if output.dim() == 3 and _is_channels_first(module) else output

    return hook


def _is_channels_first(module: nn.Module) -> bool:
    """Return whether a module writes [B, C, L], judged by its last layer."""
    layers = [layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None]
    return bool(layers) and isinstance(layers[-1], CHANNELS_FIRST)
