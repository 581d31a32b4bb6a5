"""What a network thinks on the way: the outputs of its blocks, and how far two networks' are apart.

Widths differ after pruning, so a feature f is compared through its energy map e = mean over channels of f^2, as in
attention transfer (Zagoruyko & Komodakis 2017): no projection has to be learned and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

Features = dict[str, torch.Tensor]


def feature_distance(found: Features, wanted: Features) -> torch.Tensor:
    """Mean over blocks of the relative squared distance between energy maps: [B, H, W], or [B, tokens]."""
    terms = []
    for name, reference in wanted.items():
        channels = 1 if reference.dim() == 4 else -1
        ours, theirs = found[name].square().mean(channels), reference.square().mean(channels)
        terms.append(torch.mean((ours - theirs) ** 2) / torch.mean(theirs**2).clamp_min(1e-12))
    return torch.stack(terms).mean()


@contextmanager
def captured(model: nn.Module, names: list[str]) -> Iterator[Features]:
    """Collect the outputs of the named blocks during the forwards inside the context."""
    features: Features = {}
    modules = dict(getattr(model, "module", model).named_modules())  # under DDP the model is wrapped
    with ExitStack() as stack:
        for name in names:
            hook = modules[name].register_forward_hook(_keep(features, name))
            stack.callback(hook.remove)
        yield features


def _keep(features: Features, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, tuple):
            # U-Net blocks give (stream, (skip, ...), ...), joint transformer blocks (text, stream)
            output = output[0] if isinstance(output[-1], tuple) or len(output) > 2 else output[-1]
        features[name] = output  # type: ignore[assignment]

    return hook
