"""Energy maps of blocks do not depend on the width, for features of images, video, sequences and tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpress.compress.distillation.block_features import capture_features, energy_distance, energy_map
from diffpress.runtime.errors import InvalidInputError


def block(kind: type[nn.Module], width: int) -> tuple[nn.Module, torch.Tensor]:
    """A block of this width and its input, 2 samples of 5 positions along each side."""
    ranks: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    rank = ranks.get(kind, 0)
    torch.manual_seed(0)
    layer = kind(3, width, 1) if rank else kind(3, width)
    return nn.Sequential(layer, nn.ReLU()), torch.randn(2, 3, *[5] * rank) if rank else torch.randn(2, 5, 3)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.Conv1d, (2, 5)), (nn.Conv2d, (2, 5, 5)), (nn.Conv3d, (2, 5, 5, 5)), (nn.Linear, (2, 5))],
)
def test_the_energy_map_has_no_channels(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    maps = []
    for width in (4, 7):
        inner, x = block(kind, width)
        model = nn.Sequential(inner)
        with capture_features(model, ["0"]) as features:
            model(x)
        maps.append(energy_map(features["0"]))
        channel = 1 if kind is not nn.Linear else -1
        assert torch.allclose(maps[-1], inner(x).square().mean(channel))
    assert maps[0].shape == maps[1].shape == shape


def test_maps_of_different_shapes_are_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match=r"block 'mid' has energy maps \[2, 5\], the teacher's are \[2, 6\]"):
        energy_distance({"mid": torch.zeros(2, 5, 3)}, {"mid": torch.zeros(2, 6)})


def test_outputs_that_are_no_tensors_of_numbers_are_left_out() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    model = nn.Sequential(nn.Linear(3, 3), Odd())
    with capture_features(model, ["0", "1"]) as features:
        model(torch.zeros(2, 3))
    assert list(features) == ["0"]
