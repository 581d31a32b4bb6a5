"""runtime/sample_request.py: every sample gets its own prompt, class or arrays, whatever the group it is made in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffpress.runtime import sample_request
from diffpress.runtime.conditioning import Conditioning, TensorInput
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.sample_request import SampleRequest, conditioned
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.test_pipeline import TEXT, make_spec


class FakePipeline:
    """Encodes a prompt into the number in it, and records how many prompts are encoded at a time."""

    def __init__(self) -> None:
        self.encoded: list[list[str]] = []

    def conditions(self, count: int, spec: DenoiserSpec, **given: Any) -> ConditioningInputs:
        if given.get("prompts") is not None:
            self.encoded.append(given["prompts"])
            numbers = np.array([float(prompt) for prompt in given["prompts"]])
            negatives = given["negatives"] or ["-1"] * count
            return ConditioningInputs({"states": numbers}, {"states": np.array([float(n) for n in negatives])})
        if given.get("labels") is not None:
            assert len(given["labels"]) == count
            return ConditioningInputs({"class_labels": np.asarray(given["labels"])})
        return ConditioningInputs({} if given["tensors"] is None else given["tensors"])


def groups(spec: DenoiserSpec, request: SampleRequest, indices: Any, size: int) -> tuple[Any, list[int], FakePipeline]:
    """Return what `conditioned` yields, joined: index -> value of the first input; the sizes; the pipeline."""
    pipeline: Any = FakePipeline()
    found: dict[int, Any] = {}
    sizes: list[int] = []
    for group, conditions in conditioned(pipeline, spec, request, np.asarray(indices), size):
        sizes.append(len(group))
        values = next(iter(conditions.cond.values()), np.zeros(len(group)))
        found |= dict(zip(group.tolist(), values.tolist(), strict=True))
    return found, sizes, pipeline


PROMPTS = tuple(str(k) for k in range(5))


def test_sample_i_has_prompt_i_over_number_and_each_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    request = SampleRequest(seed=0, number=3, prompts=PROMPTS)
    found, sizes, pipeline = groups(make_spec(TEXT), request, range(15), size=4)
    assert found == {i: i // 3 for i in range(15)} and pipeline.encoded == [list(PROMPTS)] and max(sizes) == 4
    monkeypatch.setattr(sample_request, "ENCODED_BYTES", 0)  # room for one group's prompts alone
    found, _, pipeline = groups(make_spec(TEXT), request, range(15), size=2)
    assert found == {i: i // 3 for i in range(15)} and pipeline.encoded == [["0", "1"], ["2", "3"], ["4"]]


def test_only_the_prompts_of_samples_that_are_still_to_be_made_are_encoded() -> None:
    found, _, pipeline = groups(make_spec(TEXT), SampleRequest(0, 2, PROMPTS), [3, 8, 9], size=8)
    assert found == {3: 1, 8: 4, 9: 4} and pipeline.encoded == [["1", "4"]]


def test_the_negative_prompt_belongs_to_every_sample() -> None:
    pipeline: Any = FakePipeline()
    request = SampleRequest(0, 2, PROMPTS, negative="7")
    halves = [c.uncond for _, c in conditioned(pipeline, make_spec(TEXT), request, np.arange(10), 3)]
    assert [value for half in halves if half for value in half["states"].tolist()] == [7.0] * 10


def test_classes_are_taken_in_turn_over_all_groups_or_are_the_one_requested() -> None:
    spec = make_spec(Conditioning("class", classes=3))
    request = SampleRequest(0, 8)
    found, sizes, _ = groups(spec, request, [0, 1, 4, 5, 7], size=2)
    assert found == {i: i % 3 for i in (0, 1, 4, 5, 7)} and sizes == [2, 2, 1]
    assert [request.label_of(spec, i) for i in (4, 5)] == [1, 2]
    one = replace(request, label=2)
    assert set(groups(spec, one, range(8), size=3)[0].values()) == {2} and one.label_of(spec, 5) == 2
    assert request.label_of(make_spec(), 5) is None


def test_arrays_are_divided_by_row_and_those_for_all_samples_are_not() -> None:
    tensors = {"x": TensorInput(()), "y": TensorInput((2,))}
    spec = make_spec(Conditioning("tensors", tensors=tensors))
    request = SampleRequest(0, 5, tensors={"x": np.arange(5.0), "y": np.array([1.0, 2.0])})
    pipeline: Any = FakePipeline()
    for group, conditions in conditioned(pipeline, spec, request, np.arange(5), 2):
        assert conditions.cond["x"].tolist() == group.tolist() and conditions.cond["y"].tolist() == [1.0, 2.0]


def test_a_model_without_conditioning_gets_none() -> None:
    found, sizes, _ = groups(make_spec(), SampleRequest(0, 5), range(5), size=4)
    assert sizes == [4, 1] and len(found) == 5
