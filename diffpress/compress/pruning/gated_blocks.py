"""Gates on blocks, and their distribution: each block is kept with a probability, and the cost of all is met.

    output = m f(x) + (1 - m) x          m = 1: the block as it is;  m = 0: the block removed, x as in removed_blocks.py

for each output of the block. Gates are sampled from logits l with logistic noise g, the difference of the two Gumbel
variables of the Gumbel-softmax over {keep, remove} (Jang et al. 2017). With the saved cost c of each block,

    soft    y_i = sigmoid((l_i + g_i - t) / T)        t such that  sum_i c_i (1 - y_i) = cost to save
    hard    m_i = 0 for the smallest l_i + g_i, until their c reaches the cost to save; else 1
    p_i = sigmoid(l_i - t)                            the probability of keeping block i, with t as above

The forward pass uses m, the gradient is that of y (straight-through). Through t it is that of a price:

    dL/dl_i = y_i' (a_i - c_i A),     a_i = dL/dm_i,     A = sum_j y_j' a_j / sum_j y_j' c_j

A block loses probability if its gain per saved cost, -a_i / c_i, is below the average of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffpress.compress.models.removed_blocks import Removable, RemovedBlock
from diffpress.runtime.errors import InvalidInputError

BISECTIONS = 40
SLOPE_FLOOR = 1e-8  # of the saved cost in t, where all probabilities are 0 or 1
ROUNDING = 1e-6  # of sums of costs


@contextmanager
def gated(model: nn.Module, blocks: Sequence[Removable], gates: torch.Tensor) -> Iterator[None]:
    """Gate blocks inside the context; `gates` [blocks] lie in [0, 1].

    Raises:
        InvalidInputError: While the model runs: a block changes its input in place, so the input is lost.
    """
    handles = []
    for block, gate, is_open in zip(blocks, gates.unbind(), (gates >= 0.5).tolist(), strict=True):
        module, versions = model.get_submodule(block.name), list[int]()
        handles += [
            module.register_forward_pre_hook(_remember(versions), with_kwargs=True),
            module.register_forward_hook(_gate(block, gate, is_open, versions), with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _remember(versions: list[int]) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        versions.append(_version(args, kwargs))

    return before


def _gate(block: Removable, gate: torch.Tensor, is_open: bool, versions: list[int]) -> Callable[..., Any]:
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if _version(args, kwargs) != versions.pop():
            raise InvalidInputError(
                f"prune: method recoverability: '{block.name}' changes its input in place (inplace=True?); make it "
                "write to a new tensor, or use method ablation"
            )
        passed = _removed(block, output)(*args, **kwargs)
        if not isinstance(output, tuple):
            return _mixed(gate, is_open, output, passed)
        return tuple(_mixed(gate, is_open, *pair) for pair in zip(output, passed, strict=True))

    return after


def _version(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return sum(tensor._version for tensor in tensors)


def _removed(block: Removable, output: Any) -> RemovedBlock:
    """Return what would stand for the block; one of `hidden` states writes as many channels as it passes on."""
    return RemovedBlock(block.returned, output.shape[1] if block.returned == "hidden" else None)


def _mixed(gate: torch.Tensor, is_open: bool, kept: torch.Tensor, passed: torch.Tensor) -> torch.Tensor:
    # exact at 0 and 1, as x + m (f(x) - x) is not; the first term decides the strides, which kernels depend on
    return gate * kept + (1.0 - gate) * passed if is_open else (1.0 - gate) * passed + gate * kept


# --- the distribution ------------------------------------------------------------------------------------------


def keep_probabilities(logits: torch.Tensor, saved: torch.Tensor, to_save: float) -> torch.Tensor:
    """Return the probabilities [blocks] under which the expected cost is met, with their gradient in the logits.

    Args:
        logits: [blocks].
        saved: Cost that each block saves, [blocks].
        to_save: Cost to save, at most the sum of `saved`.
    """
    values = logits.detach()
    low, high = values.min() - 40.0, values.max() + 40.0  # all are kept, none is
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = (saved * torch.sigmoid(middle - values)).sum() >= to_save
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    threshold = (low + high) / 2
    kept = torch.sigmoid(logits - threshold)
    slopes = saved * (kept * (1.0 - kept)).detach()
    # by the implicit function theorem dt/dl_i = c_i y_i' / sum_j c_j y_j'; the value of the added term is 0
    shift = (slopes * logits).sum() / slopes.sum().clamp_min(SLOPE_FLOOR)
    return torch.sigmoid(logits - threshold - (shift - shift.detach()))


def sampled_gates(
    logits: torch.Tensor, saved: torch.Tensor, to_save: float, uniform: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return gates [blocks] of 0 and 1 that meet the cost, with the gradient of the relaxed ones.

    Args:
        logits: [blocks].
        saved: Cost that each block saves, [blocks].
        to_save: Cost to save, at most the sum of `saved`.
        uniform: Random numbers in (0, 1), [blocks].
        temperature: Temperature of the relaxation.
    """
    noisy = logits + torch.logit(uniform)
    order = noisy.argsort()
    before = saved[order].cumsum(0) - saved[order]  # saved by the blocks with smaller values
    hard = torch.empty_like(noisy).scatter(0, order, (before >= to_save - ROUNDING).to(noisy.dtype))
    soft = keep_probabilities(noisy / temperature, saved, to_save)
    return hard + (soft - soft.detach())
