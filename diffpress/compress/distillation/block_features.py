"""Block outputs of a network and the distance between those of two networks.

Widths differ after pruning, so a feature f is compared through its energy map e = mean over channels of f^2, as in
attention transfer (Zagoruyko & Komodakis 2017). This needs no learned projection between the two widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

Features = dict[str, torch.Tensor]


def feature_distance(student: Features, references: Features) -> torch.Tensor:
    """Return the relative squared distance between energy maps, averaged over blocks.

    Energy maps are [B, H, W], or [B, tokens] for transformers. `student` has at least the blocks of `references`.
    """
    distances = []
    for name, reference in references.items():
        channels = 1 if reference.dim() == 4 else -1
        student_energy, reference_energy = student[name].square().mean(channels), reference.square().mean(channels)
        distances.append(
            torch.mean((student_energy - reference_energy) ** 2) / torch.mean(reference_energy**2).clamp_min(1e-12)
        )
    return torch.stack(distances).mean()


@contextmanager
def capture_features(model: nn.Module, names: list[str]) -> Iterator[Features]:
    """Collect the outputs of the named blocks in every forward pass inside the context."""
    features: Features = {}
    modules = dict(getattr(model, "module", model).named_modules())  # DDP wraps the model
    with ExitStack() as stack:
        for name in names:
            hook = modules[name].register_forward_hook(_store_output(features, name))
            stack.callback(hook.remove)
        yield features


def _store_output(features: Features, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, tuple):
            # U-Net blocks return (hidden states, (skip, ...), ...), joint transformer blocks (text, hidden states)
            output = output[0] if isinstance(output[-1], tuple) or len(output) > 2 else output[-1]
        features[name] = output  # type: ignore[assignment]

    return hook
