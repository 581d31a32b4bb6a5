"""`sparsity`: two zeros in every four consecutive inputs of a weight (2:4), by nvidia-modelopt.

    magnitude   the two smallest of four are zero (NVIDIA's ASP, Mishra et al. 2021, arXiv:2104.08378)
    sparsegpt   those that change the layer's output least on inputs that it receives while sampling (Frantar & Alistarh
                2023, arXiv:2301.00774); modelopt takes the choice from it, not its update of the other weights

The shapes stay: only GPUs with sparse tensor cores compute such layers faster (TensorRT, `sparse_weights`). Of a
convolution the four are consecutive input channels at one position of the kernel. modelopt's sparsegpt takes four of
the flattened kernel, which no GPU has kernels for, so convolutions larger than 1 x 1 are chosen by magnitude.

Training keeps the zeros (training/loop.py), and export verifies them (export/verify/sparsity.py).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import adapter_for, dummy_inputs, small_spec
from diffpress.compress.models.fast_path import without_fast_path
from diffpress.compress.models.widths import replace_tensors_
from diffpress.compress.pruning.config import PruneSparsityConfig
from diffpress.compress.pruning.visited_states import visited_batches
from diffpress.compress.quantization.layer_kinds import NOT_CALLED, layer_input, unsupported
from diffpress.compress.quantization.layer_selection import check_ignored_layers, described, matches
from diffpress.runtime.errors import InvalidInputError

logger = logging.getLogger(__name__)

SPARSE = (nn.Linear, nn.Conv2d)
OUT_MULTIPLE, IN_MULTIPLE = 8, 16  # widths that sparse kernels need, as in modelopt


def prune_sparsity(checkpoint: Checkpoint, config: PruneSparsityConfig, ctx: Context) -> Checkpoint:
    """Set two of every four inputs of the layers' weights to zero.

    Raises:
        InvalidInputError: A pattern matches no layer, or no layer has widths that sparse kernels support.
    """
    model = checkpoint.clone_model().eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SPARSE)}
    ranks = {name: len(shape) for name, shape in input_shapes(layers, model, checkpoint).items()}
    chosen, dense = _choose_layers(layers, model, ranks, config)
    if not chosen:
        why = described(dense) or "all are sensitive or ignored"
        raise InvalidInputError(f"prune: no layer can be 2:4 sparse: {why}")
    if dense:
        logger.warning(f"prune: left dense: {described(dense)}")
    products = {name for name in chosen if _is_product(layers[name], ranks[name])}
    by_error = products if config.method == "sparsegpt" else set[str]()

    def evaluate() -> None:
        forward = adapter_for(model).forward
        with torch.no_grad():
            for inputs in visited_batches(checkpoint, config.samples, ctx):
                forward(model, inputs)

    _sparsify_(model, [name for name in chosen if name not in by_error], "sparse_magnitude")
    _sparsify_(model, sorted(by_error), "sparsegpt", evaluate)
    logger.info(f"prune: {len(chosen)} layers are 2:4 sparse")
    return checkpoint.evolve(model=model, sparse_layers=tuple(sorted({*checkpoint.sparse_layers, *chosen})))


def input_shapes(layers: Mapping[str, nn.Module], model: nn.Module, checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Return the shape of the input, at a small size, of each of the layers that is called."""
    found: dict[str, torch.Size] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, args, kwargs: found.__setitem__(name, layer_input(args, kwargs).shape)

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    with torch.no_grad(), without_fast_path():
        adapter_for(model).forward(model, dummy_inputs(small_spec(model, checkpoint.spec), 1))
    for handle in handles:
        handle.remove()
    return found


def _choose_layers(
    layers: Mapping[str, Any], model: nn.Module, ranks: dict[str, int], config: PruneSparsityConfig
) -> tuple[list[str], dict[str, str]]:
    """Return the layers to sparsify, and why others that are not sensitive or ignored stay dense."""
    check_ignored_layers(model, layers, config.ignored_layers, "prune")
    sensitive = set(adapter_for(model).sensitive_layers(model))
    chosen, dense = [], {}
    for name, layer in layers.items():
        if name in sensitive or any(matches(name, pattern) for pattern in config.ignored_layers):
            continue
        if reason := unsupported(layer) or (NOT_CALLED if name not in ranks else ""):
            dense[name] = reason
        elif layer.weight.shape[0] % OUT_MULTIPLE or layer.weight.shape[1] % IN_MULTIPLE:
            dense[name] = f"widths are not multiples of {OUT_MULTIPLE} out and {IN_MULTIPLE} in"
        else:
            chosen.append(name)
    return chosen, dense


def _is_product(layer: Any, rank: int) -> bool:
    """Return whether modelopt's sparsegpt reads the layer's input: up to [B, tokens, in], or of a 1 x 1 convolution."""
    return rank <= 3 if isinstance(layer, nn.Linear) else layer.kernel_size == (1, 1) and layer.groups == 1


def _sparsify_(model: nn.Module, names: list[str], mode: str, evaluate: Callable[[], None] = lambda: None) -> None:
    """Sparsify the named layers with modelopt, whose search is run on these layers alone."""
    if not names:
        return
    layers = nn.ModuleList(model.get_submodule(name) for name in names)
    replace_tensors_(model, {id(weight): weight.detach().contiguous() for weight in layers.parameters()})
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # modelopt warns about optional plugins
        from modelopt.torch import sparsity

        sparsity.sparsify(layers, mode, {"verbose": False, "forward_loop": lambda _: evaluate()})
        sparsity.export(layers)
