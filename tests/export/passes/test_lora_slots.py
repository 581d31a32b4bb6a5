"""export/passes/lora_slots.py: branches add nothing until they are set, and then what torch adds to the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.export.graph.model import Graph
from diffpress.export.lowering import PassContext, lower
from diffpress.export.passes.lora_slots import Shape, slot_layers, with_lora_slots
from diffpress.runtime.lora.slots import Factors, fill_, lora_arrays
from tests.export.oracle import inputs_for, run_exactly

RANK = 4


def arrays_of(graph: Graph) -> dict[str, np.ndarray]:
    """Return zeros for the slots of a graph."""
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in graph.proto.graph.input
    }
    return lora_arrays(shapes)


def drawn(layers: Mapping[str, Shape], rank: int = 3, size: float = 0.3) -> dict[str, Factors]:
    """Draw factors for layers; the product is of the size of a weight."""
    noise = np.random.default_rng(0)
    found = {}
    for name, (out, width, *kernel) in layers.items():
        down = noise.standard_normal((rank, width, *kernel), np.float32) / np.sqrt(width * np.prod(kernel, dtype=int))
        found[name] = Factors(down.astype(np.float32), size * noise.standard_normal((out, rank), np.float32))
    return found


def fused(checkpoint: Checkpoint, lora: Mapping[str, Factors]) -> nn.Module:
    """Return the model with the factors added to its weights."""
    model = checkpoint.clone_model()
    for name, one in lora.items():
        weight: Any = model.get_submodule(name).weight
        weight.data += torch.from_numpy(np.tensordot(one.up, one.down, 1))
    return model


def filled(graph: Graph, *loras: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    arrays = arrays_of(graph)
    fill_(arrays, RANK, loras)
    return arrays


@pytest.mark.parametrize("name", ["everything", "unet"])
def test_a_graph_computes_with_a_lora_what_torch_computes_with_fused_weights(
    name: str, request: pytest.FixtureRequest
) -> None:
    checkpoint, graph = request.getfixturevalue(name), request.getfixturevalue(f"{name}_graph")
    layers = slot_layers(graph, convolutions=True)
    lora, inputs, slotted = drawn(layers), inputs_for(checkpoint), with_lora_slots(graph, layers, 2 * RANK)
    plain = run_exactly(graph, inputs)
    np.testing.assert_array_equal(run_exactly(slotted, inputs | arrays_of(slotted)), plain)
    expected = TorchNetwork(fused(checkpoint, lora), checkpoint.spec).run(inputs)
    assert sqnr_db(plain, expected) < 20
    assert sqnr_db(expected, run_exactly(slotted, inputs | filled(slotted, lora))) > 90
    # the second slot adds to the first
    both = fused(checkpoint.evolve(model=fused(checkpoint, lora)), lora)
    twice = TorchNetwork(both, checkpoint.spec).run(inputs)
    assert sqnr_db(twice, run_exactly(slotted, inputs | filled(slotted, lora, lora))) > 90


def test_slots_are_beside_linear_layers_and_1x1_convolutions_unless_all_are_asked_for(everything_graph: Graph) -> None:
    linear, every = slot_layers(everything_graph), slot_layers(everything_graph, convolutions=True)
    assert set(linear) == {"gemm", "matmul", "unbiased", "twice", "last"}
    assert set(every) - set(linear) == {"first", "twin_a", "twin_b", "down"}
    assert linear["gemm"] == (12, 8) and linear["last"] == (2, 6, 1, 1) and every["down"] == (8, 8, 2, 2)


@pytest.mark.parametrize("settings", [{"outputs": True, "residual_outputs": True}, {"kind": "w4a8"}], ids=str)
def test_a_branch_is_in_float_beside_a_quantized_layer(
    settings: dict[str, Any], unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    quantization, inputs = scales(unet, **settings), inputs_for(unet)
    layers = slot_layers(unet_graph, convolutions=True)
    lora = drawn(layers)
    graph = lower(with_lora_slots(unet_graph, layers, 2 * RANK), "cpu", PassContext(quantization))
    model = fake_quantized(unet.evolve(quantization=quantization))
    for name, one in lora.items():
        model.get_submodule(name).register_forward_hook(beside(model.get_submodule(name), one))
    expected = TorchNetwork(model, unet.spec).run(inputs)
    plain = run_exactly(graph, inputs | arrays_of(graph))
    found = run_exactly(graph, inputs | filled(graph, lora))
    # a value that lies between two integers may be rounded to the other one, which changes all that follows
    each = [sqnr_db(one, other) for one, other in zip(expected, found, strict=True)]
    assert max(each) > 90 and min(each) > 20
    assert sqnr_db(expected, plain) < 20


def beside(layer: Any, one: Factors) -> Callable[..., torch.Tensor]:
    """Return a hook that adds the branch, computed from the layer's float input, to what the layer returns."""
    down, up = torch.from_numpy(one.down), torch.from_numpy(one.up)

    def hook(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        if down.dim() == 2:
            return out + args[0] @ down.T @ up.T
        narrow = torch.nn.functional.conv2d(args[0], down, None, layer.stride, layer.padding, layer.dilation)
        return out + torch.einsum("or,brhw->bohw", up, narrow)

    return hook
