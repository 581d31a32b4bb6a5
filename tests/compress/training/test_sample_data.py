"""Samples for training and calibration: as float arrays of any shape or uint8 images, with their conditioning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress.training.sample_data import load_samples, read_images
from diffpress.runtime.conditioning import Conditioning, TensorInput
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

SCHEDULE = betas_schedule("linear", 50)
RNG = np.random.default_rng(0)


def spec(shape: tuple[int, ...], clip: bool = False, **settings: Any) -> DenoiserSpec:
    return DenoiserSpec("epsilon", SCHEDULE, shape, make_plan("ddim", 3, SCHEDULE, clip=clip), **settings)


def written(file: Path, **arrays: np.ndarray) -> Path:
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file


@pytest.mark.parametrize("shape", [(2,), (3, 8), (1, 4, 4), (2, 3, 4, 4)])
def test_float_samples_of_any_shape_are_drawn_as_they_are(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = RNG.standard_normal((5, *shape)) * 3.0
    np.save(tmp_path / "x.npy", x)
    for file in (written(tmp_path / "a.npz", samples=x), written(tmp_path / "b.npz", images=x), tmp_path / "x.npy"):
        data = load_samples(file, spec(shape))
        batch, cond = data.batch(64, torch.Generator().manual_seed(0))
        assert batch.dtype == torch.float32 and batch.shape == (64, *shape) and cond == {}
        rows = x.astype(np.float32)
        assert all(any(np.array_equal(one, row) for row in rows) for one in batch.numpy())
        assert len({one.tobytes() for one in batch.numpy()}) == 5


def test_uint8_images_are_scaled_to_the_data_range(tmp_path: Path) -> None:
    x = np.array([0, 255], np.uint8).repeat(16).reshape(2, 4, 4)
    data = load_samples(written(tmp_path / "x.npz", x=x), spec((1, 4, 4), data_range=(0.0, 2.0)))
    batch, _ = data.batch(32, torch.Generator().manual_seed(0))
    assert batch.unique().tolist() == [0.0, 2.0]
    assert read_images(tmp_path / "x.npz").shape == (2, 1, 4, 4)


def test_conditioning_tensors_stay_with_their_sample(tmp_path: Path) -> None:
    tensors = {"obs": TensorInput((2,), null=7.0), "y": TensorInput((), "int64")}
    policy = spec((3,), conditioning=Conditioning("tensors", tensors=tensors))
    x = np.arange(12.0).reshape(4, 3)
    file = written(tmp_path / "d.npz", samples=x, obs=x[:, :2], y=np.arange(4, dtype=np.int32))
    data = load_samples(file, policy)
    batch, cond = data.batch(32, torch.Generator().manual_seed(0))
    assert torch.equal(batch[:, :2], cond["obs"]) and torch.equal(batch[:, 0].long() // 3, cond["y"])
    assert {name: value.tolist() for name, value in data.uncond.items()} == {"obs": [[7.0, 7.0]]}
    found = data.conditions(6)  # the rows in turn
    assert found.cond["y"].tolist() == [0, 1, 2, 3, 0, 1] and found.uncond is not None
    assert (found.uncond["obs"] == 7.0).all() and np.array_equal(found.uncond["y"], found.cond["y"])


SAMPLES = np.zeros((4, 3))
OBS = {"conditioning": Conditioning("tensors", tensors={"obs": TensorInput((2,))})}
CLASS = {"conditioning": Conditioning("class", classes=3)}


@pytest.mark.parametrize(
    ("arrays", "settings", "found"),
    [
        ({}, {}, "has the arrays none; expected either 'x'"),
        ({"sample": SAMPLES}, {}, "has the arrays sample; expected either"),
        ({"samples": SAMPLES, "images": SAMPLES}, {}, "has the arrays samples, images; expected either"),
        ({"samples": np.zeros((4, 2))}, {}, "'samples' is float64 [4, 2], the model expects float [N, 3]"),
        ({"samples": np.zeros((0, 3))}, {}, "with at least one sample"),
        ({"samples": np.zeros((4, 3), int)}, {}, "'samples' is int64 [4, 3]"),
        ({"samples": SAMPLES * np.nan}, {}, "'samples' contains NaN"),
        ({"samples": SAMPLES + 255}, {"clip": True}, "values from 255 to 255, but the model's data range is -1 to 1"),
        ({"x": np.zeros((4, 3), np.uint8)}, {}, "'x' is uint8 [4, 3]; expected uint8 [N, H, W]"),
        ({"samples": SAMPLES}, OBS, "no array 'obs'"),
        ({"samples": SAMPLES, "obs": np.zeros((3, 2))}, OBS, "'obs' has 3 rows for 4 samples"),
        ({"samples": SAMPLES, "obs": np.zeros((4, 5))}, OBS, "'obs' has shape [4, 5], expected [4, 2]"),
        ({"samples": SAMPLES}, CLASS, "no labels 'y'"),
        ({"samples": SAMPLES, "y": np.zeros(4)}, CLASS, "'y' is float64 [4], expected integers [4]"),
        ({"samples": SAMPLES, "y": np.full(4, 3)}, CLASS, "labels reach 3, the model has 3 classes"),
    ],
)
def test_data_that_do_not_fit_are_refused_in_one_line(
    arrays: dict[str, np.ndarray], settings: dict[str, Any], found: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_samples(written(tmp_path / "data.npz", **arrays), spec((3,), **settings))
    assert found in str(caught.value) and "data.npz: " in str(caught.value) and "\n" not in str(caught.value)


def test_models_of_latents_take_latents_but_no_images(tmp_path: Path) -> None:
    latents = replace(spec((4, 8, 8)), latent_factor=8)
    assert len(load_samples(written(tmp_path / "l.npz", samples=np.zeros((2, 4, 8, 8))), latents)) == 2
    with pytest.raises(InvalidInputError, match=r"holds images, but the model samples latents \[4, 8, 8\]"):
        load_samples(written(tmp_path / "x.npz", x=np.zeros((2, 8, 8, 4), np.uint8)), latents)


@pytest.mark.parametrize("name", ["data.npz", "data.npy"])
def test_damaged_and_pickled_files_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    for content in (b"", b"PK\x03\x04 damaged", b"\x93NUMPY"):
        file.write_bytes(content)
        with pytest.raises(InvalidInputError, match="not readable as a"):
            load_samples(file, spec((3,)))
    np.save(tmp_path / "data.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "data.npy").rename(file)
    with pytest.raises(InvalidInputError, match="not readable as a"):
        load_samples(file, spec((3,)))
