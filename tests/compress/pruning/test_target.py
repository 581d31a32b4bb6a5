"""Targets of width pruning: the fraction that remains reaches the target, and the next smaller ratio does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.counts import count
from diffpress.compress.pruning.config import PruneConfig, PruneDepthConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.recipe import Recipe
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from tests.compress.pruning.networks import UNETS

FEW = {"round_to": 1, "batch": 4, "timesteps": 2}


def fraction(checkpoint: Checkpoint, small: Checkpoint, name: str) -> float:
    before, after = (count(one.model, one.spec) for one in (checkpoint, small))
    return after.macs / before.macs if name == "macs" else after.parameters / before.parameters


@pytest.mark.parametrize("method", ["magnitude", "taylor", "random"])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", ["macs", "params"])
def test_a_unet_is_pruned_to_a_fraction(
    name: str, scope: Any, method: Any, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    config = PruneConfig(target={name: 0.6}, scope=scope, method=method, **{**FEW, "round_to": 4})
    ctx = context(unet)
    small = prune(unet, config, ctx)
    assert 0.5 < fraction(unet, small, name) <= 0.6
    assert fraction(unet, small, name) == pytest.approx(ctx.notes[f"{name}_fraction"], abs=1e-4)
    less = config.model_copy(update={"target": None, "ratio": ctx.notes["ratio"] - 1 / 256})
    assert fraction(unet, prune(unet, less, context(unet)), name) > 0.6
    same = config.model_copy(update={"target": None, "ratio": ctx.notes["ratio"]})
    assert prune(unet, same, context(unet)).hash == small.hash


@pytest.mark.parametrize("kind", ["sd", "dit", "sd3", "flux"])
def test_every_kind_of_family_is_pruned_to_a_fraction(
    kind: str, tiny_folder: Callable[..., Any], tmp_path: Any
) -> None:
    checkpoint = load_checkpoint(tiny_folder(kind))
    config = PruneConfig(target={"params": 0.85}, method="magnitude", round_to=1)
    small = prune(checkpoint, config, Context(0, tmp_path, checkpoint))
    assert 0.75 < fraction(checkpoint, small, "params") <= 0.85


def test_a_hand_written_network_is_pruned_to_a_fraction(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    checkpoint = custom(next(iter(UNETS.values()))())
    small = prune(checkpoint, PruneConfig(target={"macs": 0.7}, method="magnitude", round_to=1), context(checkpoint))
    assert 0.5 < fraction(checkpoint, small, "macs") <= 0.7


def test_a_target_beyond_reach_names_the_smallest_fraction(unet: Checkpoint, context: Callable[..., Context]) -> None:
    config = PruneConfig(target={"macs": 0.001}, method="magnitude", round_to=8)
    with pytest.raises(
        InvalidInputError, match=r"target macs 0.001 cannot be reached: at least (0\.\d+) of the"
    ) as caught:
        prune(unet, config, context(unet))
    smallest = float(str(caught.value).rsplit("to ", 1)[1].split()[0])
    reached = prune(
        unet, config.model_copy(update={"target": PruneConfig(target={"macs": smallest}).target}), context(unet)
    )
    assert smallest - 1e-3 <= fraction(unet, reached, "macs") <= smallest


class Stopwatch:
    """Engine costs whose latency is a function of the pruned network, so that no test depends on a machine's speed."""

    def __init__(self, whole: Checkpoint, overhead: float) -> None:
        self.whole, self.overhead, self.measured = whole, overhead, 0

    def relative_latency(self, pruned: Checkpoint) -> float:
        self.measured += 1
        return self.overhead + (1 - self.overhead) * fraction(self.whole, pruned, "macs")


@pytest.mark.parametrize("depth", [False, True])
def test_a_latency_is_measured_in_the_engine_and_reached(
    depth: bool, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    watch, engines = Stopwatch(unet, overhead=0.3), []

    @contextmanager
    def opened(checkpoint: Checkpoint, engine: str) -> Iterator[Any]:
        assert checkpoint is unet
        engines.append(engine)
        yield watch

    target = {"latency": 0.7, "engine": "onnxruntime"}
    width: dict[str, Any] = {"target": target, "method": "magnitude", "round_to": 4}
    config = PruneDepthConfig(target=target, samples=1) if depth else PruneConfig(**width)
    small = prune(unet, config, replace(context(unet), open_engine_costs=opened))
    assert 0.6 < watch.relative_latency(small) <= 0.7
    assert engines == ["onnxruntime"] and watch.measured > 3


def test_noise_of_the_engine_is_no_gain(unet: Checkpoint, context: Callable[..., Context]) -> None:
    class Noisy(Stopwatch):
        def relative_latency(self, pruned: Checkpoint) -> float:
            return 0.9  # whatever it is given

    opened: Any = nullcontext(Noisy(unet, 0.0))
    ctx = replace(context(unet), open_engine_costs=lambda checkpoint, engine: opened)
    for config in (
        PruneConfig(target={"latency": 0.95}, method="magnitude", round_to=4),
        PruneDepthConfig(target={"latency": 0.95}, samples=1),
    ):
        assert fraction(unet, prune(unet, config, ctx), "params") < 1


def test_a_latency_without_an_engine_is_refused(unet: Checkpoint, context: Callable[..., Context]) -> None:
    with pytest.raises(InvalidInputError, match="target latency is measured in an engine"):
        prune(unet, PruneConfig(target={"latency": 0.7}, method="magnitude"), context(unet))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{ratio: 0.3, target: {macs: 0.5}}", "ratio and target exclude each other"),
        ("{target: {}}", "a target is one of macs, params, latency"),
        ("{target: {macs: 0.5, params: 0.5}}", "a target is one of macs, params, latency"),
        ("{target: {macs: 1.5}}", "prune.target.macs"),
        ("{target: {latncy: 0.5}}", "unknown key 'stages[0].prune.target.latncy'"),
        ("{target: {macs: 0.5, engine: onnxruntime}}", "engine belongs to a target of latency"),
        ("{kind: deep}", "prune: kind 'deep': did you mean 'depth'?"),
        ("{kind: depth, ratio: 0.3}", "unknown key 'stages[0].prune.ratio'"),
        ("{threshold: 0.1}", "threshold belongs to method diff_pruning, not taylor"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_path(
    settings: str, words: str, tmp_path: Any
) -> None:
    (tmp_path / "r.yaml").write_text(f"stages:\n  - prune: {settings}\n")
    with pytest.raises(InvalidInputError) as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_ratio_has_a_default_only_without_a_target() -> None:
    assert PruneConfig().ratio == 0.3
    assert PruneConfig(target={"macs": 0.5}).ratio is None
