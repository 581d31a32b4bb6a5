"""compress/models/kept_indices.py: the recorded indices cut the unpruned weights to the pruned ones, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.kept_indices import kept_from_json, kept_to_json
from diffpress.compress.pruning.config import PruneConfig, PruneDepthConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from tests.compress.pruning.networks import EXACT, UNETS


def config(**settings: Any) -> PruneConfig:
    return PruneConfig(**{"method": "magnitude", "ratio": 0.4, "round_to": 1, **settings})


def assert_cut_from(small: Checkpoint, whole: Checkpoint) -> None:
    """Every tensor of `small` is that of `whole` at the kept indices, and some lost a part."""
    original = dict(whole.model.named_parameters()) | dict(whole.model.named_buffers())
    tensors = dict(small.model.named_parameters()) | dict(small.model.named_buffers())
    for name, tensor in tensors.items():
        cut = original[name]
        for dim, indices in small.kept_indices.get(name, {}).items():
            cut = cut.index_select(dim, torch.from_numpy(indices))
        assert torch.equal(cut, tensor), name
    assert small.kept_indices and set(small.kept_indices) <= set(tensors)


@pytest.mark.parametrize(("scope", "residual"), [("local", None), ("global", None), ("global", True)])
@pytest.mark.parametrize("kind", ["ldm", "sd", "dit", "pixart-alpha", "sd3", "flux"])
def test_the_weights_of_every_family_are_cut_at_the_kept_indices(
    kind: str, scope: Any, residual: bool | None, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    whole = load_checkpoint(tiny_folder(kind))
    small = prune(whole, config(scope=scope, ratio=0.5, residual=residual), Context(0, tmp_path, whole))
    assert_cut_from(small, whole)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", [name for name in (*EXACT, *UNETS) if "spectral" not in name])  # those are rescaled
def test_the_weights_of_any_module_are_cut_at_the_kept_indices(
    name: str, custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    whole = custom({**EXACT, **UNETS}[name]())
    small = prune(whole, config(), context(whole))
    assert_cut_from(small, whole)


def test_two_prunings_and_a_removed_block_count_from_the_unpruned_model(
    unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    once = prune(unet, config(round_to=4, ratio=0.2), context(unet))
    twice = prune(once, config(round_to=4, ratio=0.4, method="random"), context(unet))
    small = prune(twice, PruneDepthConfig(remove=("mid_block.resnets.0",)), context(unet))
    assert_cut_from(twice, unet)
    assert_cut_from(small, unet)
    assert any(name.startswith("mid_block.resnets.0") for name in twice.kept_indices)

    save_checkpoint(small, tmp_path / "small")
    loaded = load_checkpoint(tmp_path / "small")
    assert kept_to_json(loaded.kept_indices) == kept_to_json(small.kept_indices)
    assert_cut_from(loaded, unet)


def test_indices_are_written_as_ranges() -> None:
    kept = {"w": {1: np.array([0, 1, 2, 3, 5, 8, 9]), 0: np.array([4])}}
    written = {"w": {"0": "4", "1": "0-3 5 8-9"}}
    assert kept_to_json(kept) == written
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(1, 7))
    assert kept_to_json(kept_from_json(written, module, "here")) == written


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"conv_in.weight": {"0": "0-2"}},
        {"conv_in.weight": {"7": "0-3"}},
        {"conv_in.weight": {"0": "3 0-10"}},
        {"conv_in.weight": {"\u00b2": "0-3"}},
        {"conv_in.weight": {"0": "5-4 0-11"}},
        {"conv_in.weight": {"0": "0-999999999"}},
        {"conv_in.weight": {"0": "all"}},
        {"conv_in.weight": {"0": [0, 1]}},
        {"conv_in.weight": ["0-3"]},
        {"conv_in.wait": {"0": "0-3"}},
    ],
)
def test_indices_that_do_not_match_are_refused(
    record: Any, unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    save_checkpoint(prune(unet, config(round_to=4), context(unet)), tmp_path / "small")
    file = tmp_path / "small" / "diffpress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kept_indices": record}))
    with pytest.raises(InvalidInputError, match=r"diffpress\.json: kept_indices"):
        load_checkpoint(tmp_path / "small")
