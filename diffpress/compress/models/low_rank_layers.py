"""Layers whose weight is a product of two factors of low rank, each a layer of its own.

    y = W x + b, W [out, in]    ->    y = up(down(x)), down [rank, in], up [out, rank] with the bias
    convolution [out, in, kh, kw]     down is a convolution [rank, in, kh, kw] with its stride and padding, up is 1 x 1

    {"mid_block.attentions.0.to_q": 16, ...}        the rank of each, as JSON in diffpress.json

Code around the layer runs unchanged: it keeps the name, and the attributes that are read of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffpress.runtime.errors import InvalidInputError

WHOLE = (nn.Linear, nn.Conv2d)  # layers that can be replaced

# attributes of the whole layer that one of its factors has
OF_DOWN = ("in_features", "in_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode", "groups")
OF_UP = ("out_features", "out_channels", "bias")


class LowRankLayer(nn.Module):
    """Stands for a linear layer or a convolution.

    Attributes:
        down: The layer that reads the input, without a bias.
        up: The layer that writes the output.
    """

    def __init__(self, down: nn.Linear | nn.Conv2d, up: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.down, self.up = down, up

    @property
    def rank(self) -> int:
        """The number of features or channels between the factors."""
        return len(self.down.weight)

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the whole layer, for code that reads it instead of calling the layer."""
        product = self.up.weight.flatten(1) @ self.down.weight.flatten(1)
        return product.view(len(product), *self.down.weight.shape[1:])

    def __getattr__(self, name: str) -> Any:
        """Return what is no attribute of a module from the factor that has it."""
        if name in OF_DOWN:
            return getattr(self.down, name)
        if name in OF_UP:
            return getattr(self.up, name)
        return super().__getattr__(name)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the output of the whole layer."""
        output: torch.Tensor = self.up(self.down(input))
        return output


def empty_low_rank(layer: Any, rank: int) -> LowRankLayer:
    """Return factors of `rank` for a layer, with uninitialized weights on its device."""
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        factors: Any = (
            nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=False, **like),
            nn.utils.skip_init(nn.Linear, rank, layer.out_features, bias=has_bias, **like),
        )
    else:
        position = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        position["padding_mode"] = layer.padding_mode
        kernel: Any = layer.kernel_size
        factors = (
            nn.utils.skip_init(nn.Conv2d, layer.in_channels, rank, kernel, bias=False, **position, **like),
            nn.utils.skip_init(nn.Conv2d, rank, layer.out_channels, 1, bias=has_bias, **like),
        )
    found = LowRankLayer(*factors).train(layer.training)
    return found.requires_grad_(layer.weight.requires_grad)


def low_rank_layers(model: nn.Module) -> dict[str, int]:
    """Return the rank of each low-rank layer by name, as JSON."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def replace_layers_(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put other modules in the places of the named ones."""
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)


def restore_low_rank_layers_(model: nn.Module, record: Any, where: str) -> None:
    """Replace the layers that diffpress.json lists in a freshly built model, before its widths are applied.

    Raises:
        InvalidInputError: The record does not match the model; the message starts with `where`.
    """
    if not isinstance(record, dict):
        raise InvalidInputError(f"{where}: low_rank_layers must be a JSON object with the rank of each layer")
    modules: dict[str, Any] = dict(model.named_modules())
    for name, rank in record.items():
        layer = modules.get(name)
        if not name or not isinstance(layer, WHOLE) or getattr(layer, "groups", 1) != 1:
            raise InvalidInputError(f"{where}: low_rank_layers names a layer '{name}' that this model does not have")
        if type(rank) is not int or not 1 <= rank <= full_rank(layer):
            raise InvalidInputError(
                f"{where}: low_rank_layers: the rank of '{name}' is {rank!r}, not a number from 1 to {full_rank(layer)}"
            )
    replace_layers_(model, {name: empty_low_rank(modules[name], rank) for name, rank in record.items()})


def full_rank(layer: Any) -> int:
    """Return the largest rank that the weight of a layer can have."""
    return min(len(layer.weight), layer.weight[0].numel())


def whole_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of every parameter and buffer, with low-rank layers as if they were whole."""
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer):
            shapes[f"{name}.weight"] = torch.Size([len(module.up.weight), *module.down.weight.shape[1:]])
            if module.bias is not None:
                shapes[f"{name}.bias"] = module.bias.shape
    return shapes
