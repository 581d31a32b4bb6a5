"""compress/quantization/layer_graph.py: one traced evaluation shows how layers are connected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.quantization.layer_graph import trace_layer_graph


def test_traced_concatenations_are_the_skip_connections_and_have_the_pruned_widths(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    small = prune(unet, PruneConfig(method="magnitude", ratio=0.4, round_to=4), context(unet))
    for checkpoint in (unet, small):
        model = checkpoint.model
        parts = trace_layer_graph(model, checkpoint.spec).concats
        concat_names = [
            name for name, _ in model.named_modules() if re.fullmatch(r"up_blocks\.\d+\.resnets\.\d+", name)
        ]
        assert {f"{concat}.conv1" for concat in concat_names} <= set(parts)
        modules = dict(model.named_modules())
        for name in (f"{concat}.{layer}" for concat in concat_names for layer in ("conv1", "conv_shortcut")):
            if name in modules:
                assert len(parts[name]) == 2 and sum(parts[name]) == modules[name].in_channels
    first = concat_names[0]
    small_model: Any = small.model
    assert parts[f"{first}.conv1"][0] == small_model.mid_block.resnets[-1].conv2.out_channels


def test_a_layer_that_reads_two_tensors_merges_their_groups(custom: Callable[..., Checkpoint]) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.alone = (nn.Conv2d(1, 1, 1) for _ in range(4))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            other = sample + 1
            return self.alone(self.a(sample) + self.b(sample) + self.b(other) + self.c(other))

    checkpoint = custom(TwoInputs())
    graph = trace_layer_graph(checkpoint.model, checkpoint.spec)
    groups = graph.shared_inputs(["a", "b", "c", "alone"])
    assert sorted(map(sorted, groups)) == [["a", "b", "c"], ["alone"]]


def test_ranks_distinguish_sequences_from_embeddings_and_images(unet: Checkpoint) -> None:
    ranks = trace_layer_graph(unet.model, unet.spec).ranks
    assert ranks["mid_block.attentions.0.to_q"] == 3 and ranks["time_embedding.linear_1"] == 2
    assert ranks["conv_in"] == 4 and len(ranks) == sum(
        isinstance(m, nn.Conv2d | nn.Linear) for m in unet.model.modules()
    )


def test_the_model_keeps_no_hooks_and_runs_once(unet: Checkpoint) -> None:
    evaluations: list[int] = []
    hook = unet.model.register_forward_pre_hook(lambda *_: evaluations.append(1))
    trace_layer_graph(unet.model, unet.spec)
    hook.remove()
    assert evaluations == [1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.model.modules())
