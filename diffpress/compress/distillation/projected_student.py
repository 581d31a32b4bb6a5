"""Outputs of a student's blocks, projected onto the channels of the teacher's.

    L_feat = mean_b |P_b f_s^b - f_t^b|^2 / |f_t^b|^2           (FitNets, Romero et al. 2015, arXiv:1412.6550, eq. 3)

f is the output of block b, and P_b [C_t, C_s] a linear map of its channels, a 1x1 convolution without bias: for images
[B, C, H, W] along axis 1, for tokens [B, tokens, C] along the last. Where both widths are equal there is no P_b: the
channels are compared one by one.

P_b starts as the selection of the channels that pruning kept, if the checkpoint records them, and else as random
orthogonal vectors. It is trained along with the student, saved with the training state, and dropped at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.modules.conv import _ConvTransposeNd

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.distillation.block_features import (
    Features,
    capture_features,
    channel_axis,
    check_comparable,
    dummy_features,
    energy_map,
)
from diffpress.compress.models.low_rank_layers import LowRankLayer
from diffpress.compress.training.losses import Tensors, forward
from diffpress.runtime.spec import DenoiserSpec

CHECKED_CHANNELS = 2


class ProjectedStudent(nn.Module):
    """A student, and the projections of the blocks whose widths differ from the teacher's.

    Attributes:
        base: The student.
        projections: P_b [C_t, C_s] of these blocks, in their order.
    """

    def __init__(self, base: nn.Module, spec: DenoiserSpec, projections: Mapping[str, torch.Tensor | None]) -> None:
        """Wrap `base`, whose features are the outputs of the blocks in `projections`, projected unless None."""
        super().__init__()
        self.base, self._spec, self._blocks = base, spec, tuple(projections)
        projected = {name: weight for name, weight in projections.items() if weight is not None}
        self.projections = nn.ParameterList(projected.values())
        self._projected = tuple(projected)

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditions: Tensors) -> tuple[torch.Tensor, Features]:
        """Return the student's output at x [B, ...] and timesteps t [B], and its features as wide as the teacher's."""
        with capture_features(self.base, self._blocks) as features:
            out = forward(self.base, self._spec, x, t, conditions)
        for name, weight in zip(self._projected, self.projections, strict=True):
            features[name] = project(features[name], weight)
        return out, features


def project(feature: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a feature [B, C_s, H, W] or [B, ..., C_s] with the channels `weight` [C_t, C_s] maps it to."""
    axis = channel_axis(feature)
    return linear(feature.movedim(axis, -1), weight).movedim(-1, axis)


def projected_student(
    checkpoint: Checkpoint, teacher: Checkpoint, blocks: Sequence[str], seed: int
) -> ProjectedStudent:
    """Return a copy of the checkpoint's model with projections onto the teacher's channels.

    Args:
        checkpoint: The student.
        teacher: The model whose blocks have the same names.
        blocks: Names of the blocks that are compared; those whose output is no tensor are left out.
        seed: Seed of the projections whose channels are not recorded.

    Raises:
        InvalidInputError: The outputs of a block differ in more than their channels.
    """
    ours = dummy_features(checkpoint.model, checkpoint.spec, blocks)
    theirs = dummy_features(teacher.model, checkpoint.spec, blocks)
    generator = torch.Generator().manual_seed(seed)
    projections: dict[str, torch.Tensor | None] = {}
    for name in (name for name in blocks if name in ours and name in theirs):
        check_comparable(name, energy_map(ours[name]), energy_map(theirs[name]))
        narrow, wide = (features[name].shape[channel_axis(features[name])] for features in (ours, theirs))
        kept = None if narrow == wide else kept_channels(name, ours[name], wide, checkpoint, teacher)
        if narrow == wide:
            projections[name] = None
        elif kept is None:
            projections[name] = nn.init.orthogonal_(torch.empty(wide, narrow), generator=generator)
        else:
            projections[name] = torch.eye(wide)[:, torch.from_numpy(kept)].contiguous()
    return ProjectedStudent(checkpoint.clone_model(), checkpoint.spec, projections)


def kept_channels(
    block: str, feature: torch.Tensor, wide: int, checkpoint: Checkpoint, teacher: Checkpoint
) -> np.ndarray | None:
    """Return which of the teacher's `wide` channels the `feature` of a block has; None if that is not recorded.

    They are those of a layer that writes the output, or adds to it: its entry for a channel changes this channel of the
    output and no other. `feature` is that of `dummy_features`.
    """
    modules, narrow = dict(checkpoint.model.named_modules()), feature.shape[channel_axis(feature)]
    for name, parameter in reversed(list(modules[block].named_parameters(prefix=block))):
        layer, _, own = name.rpartition(".")
        dim = 1 if isinstance(modules[layer], _ConvTransposeNd) and own == "weight" else 0
        outer = layer.rpartition(".")[0]
        recorded = f"{outer}.{own}" if isinstance(modules.get(outer), LowRankLayer) else name  # as the whole layer
        kept, kept_by_teacher = (one.kept_indices.get(recorded, {}).get(dim) for one in (checkpoint, teacher))
        if kept is None or len(kept) != narrow or not _writes(parameter, dim, block, feature, checkpoint):
            continue
        known = np.arange(wide) if kept_by_teacher is None else kept_by_teacher
        return np.searchsorted(known, kept) if len(known) == wide and np.isin(kept, known).all() else None
    return None


def _writes(parameter: nn.Parameter, dim: int, block: str, feature: torch.Tensor, checkpoint: Checkpoint) -> bool:
    """Return whether the first entries of a parameter along `dim` change their channel of the block's output alone."""
    axis, changes = channel_axis(feature), False
    for channel in range(min(CHECKED_CHANNELS, feature.shape[axis])):
        entry = parameter.data.select(dim, channel)
        before = entry.clone()
        entry.mul_(1.5).add_(0.1)
        after = dummy_features(checkpoint.model, checkpoint.spec, [block])[block]
        entry.copy_(before)
        changed = (after != feature).movedim(axis, 0).flatten(1).any(1)
        changes |= bool(changed[channel])
        changed[channel] = False
        if changed.any():
            return False
    return changes
