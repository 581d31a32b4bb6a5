"""Conditioning by named tensors: what is accepted, the unconditional half, files, and the spec's JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.conditioning import Conditioning, TensorInput
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import (
    ConditioningInputs,
    dummy_conditioning,
    network_conditioning,
    read_conditioning,
    tensor_conditioning,
)
from diffpress.runtime.noise_schedule import flow_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

SCHEDULE = flow_schedule(10)
TENSORS = {"obs": TensorInput((2, 2), null=[[1, 2], [3, 4]]), "task": TensorInput((), "int64"), "w": TensorInput((3,))}


def spec(shape: tuple[int, ...] = (3, 8), tensors: dict[str, TensorInput] = TENSORS, **settings: Any) -> DenoiserSpec:
    conditioning = Conditioning("tensors", tensors=tensors) if tensors else Conditioning()
    plan = make_plan("euler", 2, SCHEDULE)
    return DenoiserSpec("flow", SCHEDULE, shape, plan, conditioning, **settings)


def arrays(**others: Any) -> dict[str, Any]:
    return {"obs": np.ones((4, 2, 2)), "task": 3, "w": np.zeros(3, np.float16), **others}


def test_arrays_are_typed_and_one_row_serves_all_samples() -> None:
    found = tensor_conditioning(spec(), 4, arrays())
    assert {name: (a.dtype.name, a.shape) for name, a in found.cond.items()} == {
        "obs": ("float32", (4, 2, 2)),
        "task": ("int64", (4,)),
        "w": ("float32", (4, 3)),
    }
    assert found.uncond is not None and found.uncond["obs"].tolist() == [[[1, 2], [3, 4]]] * 4
    assert found.uncond["task"].tolist() == [3] * 4
    both = network_conditioning(spec(), found, guided=True)
    assert both["obs"].shape == (8, 2, 2) and both["obs"][4:].tolist() == [[[1, 2], [3, 4]]] * 4


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"obs": np.ones((4, 2, 2))}, "the model expects obs, task, w, got obs"),
        (arrays(extra=1), "got extra, obs, task, w"),
        (
            arrays(obs=np.ones((3, 2, 2))),
            "'obs' has shape [3, 2, 2], expected [4, 2, 2] for 4 samples or [2, 2] for all",
        ),
        (arrays(obs=np.full((2, 2), np.inf)), "'obs' contains NaN or infinite values"),
        (arrays(task=1.0), "'task' is float64, expected int64"),
        (arrays(w=["a", "b", "c"]), "'w' is <U1, expected float32"),
        (arrays(w=np.zeros(3, complex)), "'w' is complex128, expected float32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_one_line(given: dict[str, Any], found: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        tensor_conditioning(spec(), 4, given)
    assert found in str(caught.value) and "\n" not in str(caught.value)


def test_guidance_needs_a_tensor_with_a_null() -> None:
    plain = spec(tensors={"w": TensorInput((3,))})
    conditions = dummy_conditioning(plain, 2)
    assert conditions.uncond is None and network_conditioning(plain, conditions, guided=False)["w"].shape == (2, 3)
    with pytest.raises(InvalidInputError, match="guidance needs a tensor with a null"):
        network_conditioning(plain, conditions, guided=True)
    with pytest.raises(InvalidInputError, match="the model expects w, got none"):
        network_conditioning(plain, ConditioningInputs(), guided=False)


def test_conditioning_is_read_from_an_npz_file(tmp_path: Path) -> None:
    file = tmp_path / "c.npz"
    np.savez(file, **arrays())
    found = read_conditioning(file, spec())
    assert found["obs"].shape == (4, 2, 2) and tensor_conditioning(spec(), 4, found).cond["task"].tolist() == [3] * 4
    with pytest.raises(InvalidInputError, match="has the arrays obs, task, w; the model expects obs"):
        read_conditioning(file, spec(tensors={"obs": TENSORS["obs"]}))
    with pytest.raises(InvalidInputError, match="is not conditioned on tensors"):
        read_conditioning(file, spec(tensors={}))
    np.save(tmp_path / "c.npy", np.zeros(3))
    with pytest.raises(InvalidInputError, match="expected an npz file of named arrays"):
        read_conditioning(tmp_path / "c.npy", spec())
    with pytest.raises(InvalidInputError, match="not readable as an npz file"):
        read_conditioning(tmp_path / "missing.npz", spec())


@pytest.mark.parametrize("shape", [(2,), (3, 8), (3, 8, 8), (1, 2, 4, 4)])
def test_a_spec_of_any_shape_with_tensors_survives_json(shape: tuple[int, ...]) -> None:
    before = spec(shape)
    again = DenoiserSpec.from_json(json.loads(json.dumps(before.to_json())))
    assert again == before and again.sample_shape == shape
    assert np.array_equal(again.conditioning.tensors["obs"].null_array, [[1, 2], [3, 4]])  # type: ignore[arg-type]


def test_the_json_of_other_specs_has_no_new_entries() -> None:
    data = spec(tensors={}).to_json()
    assert "tensors" not in data["conditioning"] and data["sample_shape"] == (3, 8)


def test_a_list_or_a_size_becomes_the_same_shape() -> None:
    assert replace(spec(), sample_shape=[3, 8]) == spec()  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1), (0,), (3, -1), (2**20, 2**20)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="must have 1 to 4 sizes, channels first"):
        spec(shape)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: TensorInput((2,), "float16"), "dtype 'float16' is not one of float32, int64"),
        (lambda: TensorInput((0,)), "shape \\(0,\\) has a size below 1"),
        (lambda: TensorInput((2,), null=[1, 2, 3]), "null has shape \\(3,\\)"),
        (lambda: TensorInput((2,), null=float("nan")), "give one finite number"),
        (lambda: TensorInput((2,), "int64", null=0.5), "null is float64, the input is int64"),
        (lambda: Conditioning("tensors"), "kind 'tensors' needs at least one"),
        (lambda: Conditioning("class", classes=2, tensors=TENSORS), "no other kind has any"),
        (lambda: Conditioning("tensors", tensors={"a b": TensorInput(())}), "'a b' must be a Python name"),
        (lambda: Conditioning("tensors", tensors={"timestep": TensorInput(())}), "'timestep' must be a Python name"),
    ],
)
def test_impossible_conditioning_is_refused(make: Any, found: str) -> None:
    with pytest.raises(InvalidInputError, match=found):
        make()


def test_only_images_have_a_size_and_are_pictures() -> None:
    assert spec((3, 8, 8)).image_size == (8, 8) and spec((3, 8, 8)).is_picture
    for shape in ((2,), (3, 8), (1, 2, 4, 4), (2, 8, 8)):
        assert not spec(shape).is_picture
    assert not replace(spec((4, 8, 8)), latent_factor=8).is_picture
    with pytest.raises(InvalidInputError, match=r"samples of shape \(3, 8\) are no images"):
        spec((3, 8)).image_size  # noqa: B018 - the property raises
