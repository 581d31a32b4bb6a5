"""Oracles: denoisers known in closed form, and a network that returns them in any prediction type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule, noise_level_at
from tests.runtime.small_graphs import write_float_graph, write_quantized_graph

INT64, FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, deviation^2): the ideal x_0 is linear in x and the probability flow has an exact solution."""

    mean: float = 0.3
    deviation: float = 0.5

    def denoise(self, x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        gain = level.alpha * self.deviation**2 / self._spread(level) ** 2
        return self.mean + gain * (x - level.alpha * self.mean)

    def flow(self, x: np.ndarray, start: NoiseLevel, end: NoiseLevel) -> np.ndarray:
        """Return where the exact probability flow moves x from `start` to `end`."""
        return end.alpha * self.mean + (x - start.alpha * self.mean) * self._spread(end) / self._spread(start)

    def _spread(self, level: NoiseLevel) -> float:
        return math.hypot(level.alpha * self.deviation, level.sigma)


@dataclass(frozen=True)
class Mixture:
    """Three narrow Gaussians per pixel: the ideal x_0 is smooth but far from linear in x."""

    means: tuple[float, ...] = (-0.8, -0.1, 0.7)
    deviation: float = 0.2

    def denoise(self, x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        variance = (level.alpha * self.deviation) ** 2 + level.sigma**2
        away = np.asarray(x, dtype=np.float64)[..., None] - level.alpha * np.asarray(self.means)
        weights = np.exp(-(away**2 - (away**2).min(axis=-1, keepdims=True)) / (2 * variance))
        weights /= weights.sum(axis=-1, keepdims=True)
        guesses = np.asarray(self.means) + level.alpha * self.deviation**2 / variance * away
        return (weights * guesses).sum(axis=-1)


@dataclass
class FakeNetwork:
    """A network that returns the `oracle`'s x_0 in the given prediction type, float32, and records its calls.

    A label k adds k / 10 to the output, and each input in `cond` a tenth of the mean of its values. Timesteps have the
    dtype `timestep_type`.
    """

    prediction: str
    schedule: NoiseSchedule
    oracle: Callable[[np.ndarray, NoiseLevel], np.ndarray] = field(default=Mixture().denoise)
    labelled: bool = False
    timestep_type: np.dtype = INT64
    cond: tuple[str, ...] = ()
    calls: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def inputs(self) -> dict[str, np.dtype]:
        labels = {"class_labels": INT64} if self.labelled else {}
        return {"sample": FLOAT32, "timestep": self.timestep_type, **labels, **dict.fromkeys(self.cond, FLOAT32)}

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.calls.append(inputs)
        x, level = inputs["sample"].astype(np.float64), noise_level_at(self.schedule, float(inputs["timestep"][0]))
        out = prediction_of(self.prediction, x, self.oracle(x, level), level)
        if self.labelled:
            out = out + inputs["class_labels"].reshape(-1, 1, 1, 1) / 10
        for name in self.cond:
            out = out + inputs[name].reshape(len(x), -1).mean(axis=1).reshape(-1, 1, 1, 1) / 10
        return out.astype(np.float32)


@dataclass
class Distorted:
    """Another network's outputs with a known error by timestep: (1 + slope) out + bias[channel]."""

    network: FakeNetwork
    errors: dict[float, tuple[float, tuple[float, ...]]]

    @property
    def inputs(self) -> dict[str, np.dtype]:
        return self.network.inputs

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        slope, bias = self.errors[float(inputs["timestep"][0])]
        out = (1 + slope) * self.network.run(inputs) + np.asarray(bias)[:, None, None]
        return out.astype(np.float32)


def prediction_of(prediction: str, x: np.ndarray, x0: np.ndarray, level: NoiseLevel) -> np.ndarray:
    """Return the output of a network with this prediction type for an x_0, as defined in runtime/spec.py."""
    if prediction == "sample":
        return x0
    eps = (x - level.alpha * x0) / level.sigma
    return {"epsilon": eps, "v": level.alpha * eps - level.sigma * x0, "flow": eps - x0}[prediction]


def unit_noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture()


@pytest.fixture
def fake_network() -> type[FakeNetwork]:
    return FakeNetwork


@pytest.fixture
def distorted() -> type[Distorted]:
    return Distorted


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    return unit_noise


@pytest.fixture
def tiny() -> Path:
    return Path(__file__).parent / "tiny_bundle"


@pytest.fixture(scope="session")
def float_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "float.onnx"
    write_float_graph(path)
    return path


@pytest.fixture(scope="session")
def quantized_graph(float_graph: Path) -> Callable[..., Path]:
    """Write the small graph with operators of these kinds quantized."""

    def quantized(*kinds: str) -> Path:
        path = float_graph.with_name(f"{'_'.join(kinds)}.onnx")
        write_quantized_graph(float_graph, path, kinds)
        return path

    return quantized


@pytest.fixture(autouse=True)
def temporary_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache into a new folder while a test runs."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DIFFPRESS_CACHE", str(folder))
    return folder
