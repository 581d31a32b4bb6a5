"""compress/training/cuda_graph.py: which steps are captured, which share a graph, and GPU results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffpress.compress.distillation.config import RecoverConfig, ScoreConfig
from diffpress.compress.training import cuda_graph, distributed
from diffpress.compress.training.cuda_graph import CapturedStep, refuse_cuda_graph
from diffpress.compress.training.loop import Objective, Training, train
from diffpress.runtime.errors import InvalidInputError


class TwoNetworks(nn.Module):
    """Two convolutional networks; a step trains one and evaluates the other, as in `score`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.nets = nn.ModuleList(
                nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.ConvTranspose2d(8, 1, 3))
                for _ in range(2)
            )


def draw(generator: torch.Generator, share: float) -> tuple[int, dict[str, torch.Tensor], list[torch.Tensor]]:
    which = int(torch.randint(0, 2, (), generator=generator))
    x = torch.randn(4, 1, 8, 8, generator=generator)
    return which, {"x": x}, [torch.randn(x.shape, generator=generator) for _ in range(1 + which)]


def loss(model: TwoNetworks, which: int, cond: dict[str, torch.Tensor], noise: list[torch.Tensor]) -> torch.Tensor:
    x = cond["x"]
    with torch.no_grad():
        for one in noise:
            x = x + 0.1 * model.nets[1 - which](x + one)
    return torch.mean((model.nets[which](x) - cond["x"]) ** 2)


def run_in(folder: Path, **settings: Any) -> Training:
    return Training(20, 0.01, 2, 0.8, 1, 100, folder, "distill test", partial=True, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_train_like_eager_steps(precision: str, tmp_path: Path) -> None:
    plain, graphs = (
        train(TwoNetworks(), Objective(draw, loss), run_in(tmp_path / str(on), precision=precision, cuda_graphs=on))
        for on in (False, True)
    )
    moved = TwoNetworks().state_dict()
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(graphs.state_dict()[name], expected, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(moved[name], expected, atol=1e-2)


def test_the_setting_has_no_effect_on_the_cpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = run_in(tmp_path / "a")
    plain = train(TwoNetworks(), Objective(draw, loss), run)
    with_graphs = train(TwoNetworks(), Objective(draw, loss), replace(run, work=tmp_path / "b", cuda_graphs=True))
    assert all(torch.equal(with_graphs.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_each_kind_of_step_runs_once_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a fake graph that returns 10 where the step itself returns 1."""
    captured = []

    class Graph:
        def __init__(
            self,
            step: Callable[..., torch.Tensor],
            parameters: list[nn.Parameter],
            drawn: tuple[Any, ...],
            tensors: list[torch.Tensor],
        ) -> None:
            captured.append(drawn[0])

        def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.tensor(10.0)

    monkeypatch.setattr(cuda_graph, "_Captured", Graph)
    step = CapturedStep(lambda which, x: torch.tensor(1.0), nn.Linear(1, 1))
    calls = [(0, 4), (0, 4), (1, 4), (0, 4), (1, 4), (0, 3), (1, 4), (0, 3)]
    found = [float(step(which, {"x": torch.zeros(size)})) for which, size in calls]
    assert found == [1, 10, 1, 10, 10, 1, 10, 10] and captured == [0, 1, 0]


def test_dropout_and_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_cuda_graph(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), "distill score")
    with pytest.raises(InvalidInputError, match="distill score: 'cuda_graphs: true' does not support dropout"):
        refuse_cuda_graph(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "distill score")
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(InvalidInputError, match="one process"):
        refuse_cuda_graph(nn.Linear(2, 2), "distill score")


@pytest.mark.parametrize("config", [RecoverConfig, ScoreConfig])
def test_accumulation_is_refused_with_the_recipe(config: type[RecoverConfig | ScoreConfig]) -> None:
    with pytest.raises(InvalidInputError, match="cuda_graphs replays steps of one batch and excludes accumulate = 2"):
        config(cuda_graphs=True, accumulate=2)
    assert config(accumulate=2).accumulate == 2
