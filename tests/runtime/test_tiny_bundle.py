"""The committed bundle, from the folder to the pixels, in every installed engine; needs neither torch nor onnx."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime import generate, load_bundle, make_plan, open_engine
from diffpress.runtime.engines import ENGINES, available
from diffpress.runtime.noise_schedule import CLEAN, NoiseLevel
from diffpress.runtime.sampler import noise_for
from diffpress.runtime.sampling_plan import plan_levels

HASH = "0fab0e1d9cf0c8582217077df7ff01821eb1c2400cc2ddc272d362d0c8183d10"
DEVIATION = 0.05  # standard deviation of each class around its image, see make_tiny_bundle.py

# the top left 2 x 3 pixels of seeds 0, 1, 2 with labels 0, 1, 2
EXPECTED_PIXELS = [
    [[-0.799273, -0.571235, -0.356802], [-0.813085, -0.576504, -0.368390]],
    [[-0.786913, -0.794530, -0.791583], [-0.548328, -0.558739, -0.578369]],
    [[0.696079, -0.702384, 0.719159], [-0.704696, 0.706918, -0.687103]],
]


@pytest.fixture(params=sorted(ENGINES))
def engine_name(request: pytest.FixtureRequest) -> str:
    if request.param not in available():
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


def class_images() -> np.ndarray:
    """Return the three class images of the graph, computed independently: [3, 8, 8]."""
    ramp = np.linspace(-0.8, 0.8, 8)
    rows, columns = np.indices((8, 8))
    return np.stack([ramp[columns], ramp[rows], np.where((rows + columns) % 2 == 0, 0.7, -0.7)])


def test_the_bundle_has_the_committed_hash(tiny: Path) -> None:
    assert load_bundle(tiny).hash == HASH


def test_samples_look_like_their_classes(tiny: Path, engine_name: str) -> None:
    bundle = load_bundle(tiny)
    with closing(open_engine(bundle, engine_name)) as engine:
        samples = generate(engine, bundle.spec, range(30))
    residual = samples[:, 0] - class_images()[np.arange(30) % 3]
    # eight steps lose most of such a small deviation; another class would be off by 0.5 or more
    assert 0.1 * DEVIATION < residual.std() < 1.2 * DEVIATION and abs(residual.mean()) < 0.01


def test_samples_have_the_recorded_pixels(tiny: Path, engine_name: str) -> None:
    bundle = load_bundle(tiny)
    with closing(open_engine(bundle, engine_name)) as engine:
        samples = generate(engine, bundle.spec, [0, 1, 2])
    assert np.abs(samples[:, 0, :2, :3] - EXPECTED_PIXELS).max() < 1e-5


def test_a_fine_plan_follows_the_exact_probability_flow(tiny: Path, engine_name: str) -> None:
    bundle = load_bundle(tiny)
    plan = make_plan("dpmpp_2m", 50, bundle.spec.schedule, clip=False)
    with closing(open_engine(bundle, engine_name)) as engine:
        samples = generate(engine, bundle.spec, range(6), plan=plan)
    start = plan_levels(bundle.spec.schedule, plan.timesteps)[0]
    means = class_images()[np.arange(6) % 3][:, None]

    def spread(level: NoiseLevel) -> float:
        return float(np.hypot(level.alpha * DEVIATION, level.sigma))

    exact = means + (noise_for(range(6), (1, 8, 8)) - start.alpha * means) * spread(CLEAN) / spread(start)
    # the noise of the last timestep (sigma 0.03) is removed in one first-order step: an error of half of DEVIATION
    assert np.abs(samples - exact).max() < DEVIATION


def test_guidance_moves_samples_away_from_the_mean_of_all(tiny: Path, engine_name: str) -> None:
    bundle = load_bundle(tiny)
    plan = make_plan("dpmpp_2m", 8, bundle.spec.schedule, guidance=1.5, clip=False)
    with closing(open_engine(bundle, engine_name)) as engine:
        guided = generate(engine, bundle.spec, range(3), plan=plan)[:, 0]
    images = class_images()
    away = images - images.mean(axis=0)
    pushed = ((guided - images.mean(axis=0)) * away).sum() / (away**2).sum()
    assert 1.3 < pushed < 1.7


def test_both_engines_make_the_same_images(tiny: Path) -> None:
    bundle = load_bundle(tiny)
    samples = [generate(open_engine(bundle, name), bundle.spec, range(6), batch=4) for name in available()]
    assert all(np.abs(sample - samples[0]).max() < 1e-5 for sample in samples)
