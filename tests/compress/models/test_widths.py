"""compress/models/widths.py: a freshly built module is resized by the JSON widths of a pruned one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.widths import apply_widths_, changed_widths, widths_of
from diffpress.runtime.errors import InvalidInputError


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_an_unpruned_module_has_no_changed_widths(unet: Checkpoint) -> None:
    assert changed_widths(unet.model, unet.source.original) == {}


def test_applying_the_changed_widths_reproduces_the_pruned_shapes(pruned: Checkpoint) -> None:
    fresh = UNet2DModel.from_config(pruned.source.config)
    assert shapes(fresh) != shapes(pruned.model)
    widths = json.loads(json.dumps(changed_widths(pruned.model, pruned.source.original)))
    apply_widths_(fresh, widths, "here")
    assert shapes(fresh) == shapes(pruned.model) and widths_of(fresh) == widths_of(pruned.model)


def test_layers_that_were_not_pruned_are_not_listed(pruned: Checkpoint) -> None:
    widths = changed_widths(pruned.model, pruned.source.original)
    assert "conv_in" in widths and "time_embedding.linear_1" not in widths


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"nowhere": {"in_channels": 1, "out_channels": 8, "groups": 1}}, "here: .*'nowhere'"),
        ({"conv_in": {"in_features": 1, "out_features": 8}}, "here: .*'conv_in'"),
        ({"conv_in": {"in_channels": 1, "out_channels": 0, "groups": 1}}, "here: .*'conv_in' .*positive integer"),
        ({"conv_in": {"in_channels": 1, "out_channels": "8", "groups": 1}}, "here: .*'conv_in'"),
        ({"conv_in": [1, 8, 1]}, "here: .*'conv_in'"),
    ],
)
def test_widths_that_do_not_match_the_module_are_refused(
    widths: dict[str, Any], message: str, plain: Checkpoint
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        apply_widths_(plain.clone_model(), widths, "here")


def test_a_module_on_the_meta_device_stays_there(pruned: Checkpoint) -> None:
    with torch.device("meta"):
        fresh = UNet2DModel.from_config(pruned.source.config)
    apply_widths_(fresh, changed_widths(pruned.model, pruned.source.original), "here")
    assert shapes(fresh) == shapes(pruned.model)
    assert {parameter.device.type for parameter in fresh.parameters()} == {"meta"}


def test_layers_of_every_kind_are_resized_by_their_attributes_and_other_tensors_by_their_shape() -> None:
    class Mixed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, width))
            self.up, self.volume = nn.ConvTranspose1d(width, 2 * width, 3), nn.Conv3d(width, width, 3, groups=width)
            self.batch, self.layer = nn.BatchNorm2d(width), nn.LayerNorm((width, 4, 4))
            self.bare, self.rms = nn.LayerNorm(width, elementwise_affine=False), nn.RMSNorm(width)
            self.prelu, self.weight_norm = nn.PReLU(width), nn.utils.parametrizations.weight_norm(nn.Linear(width, 3))

    wide, narrow = Mixed(8), Mixed(6)
    widths = json.loads(json.dumps(changed_widths(narrow, widths_of(wide))))
    assert widths[""] == {"token": [1, 1, 6]} and widths["layer"] == {"normalized_shape": [6, 4, 4]}
    assert widths["up"] == {"in_channels": 6, "out_channels": 12, "groups": 1} and widths["batch"] == {
        "num_features": 6
    }
    apply_widths_(wide, widths, "here")
    assert shapes(wide) == shapes(narrow) and widths_of(wide) == widths_of(narrow)
    wide.load_state_dict(narrow.state_dict())


@pytest.mark.parametrize("shape", [[6], [6, 0, 4], [6, 4, True], 6, "6"])
def test_a_shape_of_other_dimensions_is_refused(shape: Any) -> None:
    model = nn.Sequential(nn.LayerNorm((8, 4, 4)))
    with pytest.raises(InvalidInputError, match="here: layer '0' has a width that is not a positive integer"):
        apply_widths_(model, {"0": {"normalized_shape": shape}}, "here")
