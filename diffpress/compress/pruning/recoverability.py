"""Choice of blocks by recoverability: remove those without which the network is best after training.

TinyFusion (Fang et al. 2024) learns a distribution p(m) over the gates m of the blocks jointly with updates dW of the
weights that simulate the later training,

    min over p(m), dW   E over x, m ~ p(m)   L(x, W + dW, m)                 dW = B A, low rank (training/low_rank.py)

Here L is the distance of the output to that of the network before the stage, on images noised to all timesteps of the
noise schedule, as in `distill: {kind: recover}`. The updates belong to all linear and convolution layers. Only the
probabilities are used: the updates are shared by all sampled networks, so they fit none of them as well as training
from the original weights does. The result is that of `remove` with the same names.

TinyFusion samples N of every M consecutive layers, since the layers of a transformer cost the same. Blocks of a U-Net
do not, so here each block has a gate of its own, and one threshold for all of them makes every sampled network meet the
number of blocks or the target. A block's gain is thereby compared per saved cost, as in ablation (gated_blocks.py).
At the end the blocks are removed by their probability, the lowest first, until it is enough.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.conv import _ConvNd

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.conditioning import drop_conditioning
from diffpress.compress.models.removed_blocks import Removable
from diffpress.compress.pruning.block_goal import Goal
from diffpress.compress.pruning.config import PruneDepthConfig
from diffpress.compress.pruning.gated_blocks import gated, keep_probabilities, sampled_gates
from diffpress.compress.training.loop import Objective, Training, train
from diffpress.compress.training.losses import Tensors, add_noise, forward, inputs_at
from diffpress.compress.training.low_rank import LowRankUpdates, evaluate_with
from diffpress.compress.training.teacher_data import data_for

logger = logging.getLogger(__name__)

TEMPERATURES = 1.0, 0.1  # at the start and at the end
LOGIT_RANGE = 30.0  # AdamW changes a parameter by at most about learning_rate per step: how far a logit can move
UPDATES_ALONE = 1 / 3  # of the steps, before the gates learn as well: they have to see what training makes up for
WARMUP = 10
NETWORKS = 4  # sampled per step: on the same images, since losses differ more between images than between networks
EMA = 0.99


def by_recoverability(
    checkpoint: Checkpoint, config: PruneDepthConfig, removable: Sequence[Removable], goal: Goal, ctx: Context
) -> list[Removable]:
    """Return the blocks to remove, the least likely to be kept first; note all probabilities.

    Raises:
        InvalidInputError: A block changes its input in place.
        TrainingDivergedError: The loss is NaN or infinite.
    """
    probabilities = _search(checkpoint, config, removable, goal, ctx)
    ctx.notes["keep_probabilities"] = {block.name: round(p, 4) for block, p in probabilities.items()}
    chosen = list[Removable]()
    for block in sorted(removable, key=probabilities.__getitem__):
        if goal.is_enough(chosen):
            break
        chosen.append(block)
    return chosen


class _Searched(LowRankUpdates):
    """The network with gated blocks and updated weights; its parameters are the logits and the factors."""

    def __init__(self, model: nn.Module, removable: Sequence[Removable], goal: Goal, config: Any, seed: int) -> None:
        super().__init__(updated_weights(model), config.rank, torch.Generator().manual_seed(seed))
        self.logits = nn.Parameter(torch.zeros(len(removable)))
        self._model, self._removable = [model], removable  # a list hides the submodule: it is neither trained nor saved
        self._saved = [goal.saved[block] for block in removable]
        self._to_save = min(goal.to_save, sum(self._saved))
        self._scale = LOGIT_RANGE / (config.learning_rate * config.steps)

    def forward(self, inputs: Tensors, uniform: torch.Tensor, temperature: float, learns_gates: bool) -> torch.Tensor:
        """Return the outputs [networks, B, ...] for inputs by name of networks sampled by `uniform` [networks, blocks].

        The random numbers lie in (0, 1). The logits have a gradient if `learns_gates`.
        """
        model, saved = self._model[0], self.logits.new_tensor(self._saved)
        logits = self._scale * (self.logits if learns_gates else self.logits.detach())
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        weights |= self.updated({name: weights[name] for name in updated_weights(model)})
        outputs = []
        for numbers in uniform:
            gates = sampled_gates(logits, saved, self._to_save, numbers, temperature)
            with gated(model, self._removable, gates):
                outputs.append(evaluate_with(model, weights, inputs))
        return torch.stack(outputs)

    def probabilities(self) -> list[float]:
        """Return the probability of keeping each block."""
        saved = self.logits.new_tensor(self._saved)
        return keep_probabilities(self._scale * self.logits.detach(), saved, self._to_save).tolist()


def updated_weights(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Return the weights of the linear and convolution layers, by name; each of several tied weights once."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, _ConvNd))]
    names = {f"{layer}.weight".lstrip(".") for layer in layers}
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def _search(
    checkpoint: Checkpoint, config: PruneDepthConfig, removable: Sequence[Removable], goal: Goal, ctx: Context
) -> dict[Removable, float]:
    """Return the learned probability of keeping each block."""
    search, spec = config.search, checkpoint.spec
    assert search is not None
    data = data_for(ctx, search.samples)
    device = Accelerator(mixed_precision="no").device
    model = (checkpoint.model if device.type == "cpu" else checkpoint.clone_model()).eval().to(device)
    first, last = TEMPERATURES

    def draw(generator: torch.Generator, share: float) -> tuple[Any, ...]:
        x0, cond = data.batch(search.batch, generator)
        cond = drop_conditioning(cond, data.uncond, generator)
        t = torch.randint(0, len(spec.schedule), (search.batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        uniform = torch.rand(NETWORKS // 2, len(removable), generator=generator).clamp(1e-6, 1 - 1e-6)
        # networks in pairs of opposites: what one keeps the other tends to remove
        temperature = first * (last / first) ** share
        return x0, noise, t, cond, torch.cat([uniform, 1.0 - uniform]), temperature, share >= UPDATES_ALONE

    def loss(
        student: nn.Module,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        cond: Tensors,
        *sampling: Any,
    ) -> torch.Tensor:
        x_t = add_noise(spec, x0, noise, t)
        with torch.no_grad():
            target = forward(model, spec, x_t, t, cond)
        return torch.mean((student(inputs_at(spec, x_t, t, cond), *sampling) - target) ** 2)

    run = Training(
        search.steps,
        search.learning_rate,
        WARMUP,
        EMA,
        ctx.seed,
        search.save_every,
        ctx.work,
        "search for blocks",
        precision=search.precision,
        logs=ctx.logs,
        partial=True,  # a layer that this network does not use has no gradient
    )
    searched: Any = train(_Searched(model, removable, goal, search, ctx.seed), Objective(draw, loss), run)
    return dict(zip(removable, searched.probabilities(), strict=True))
