"""compress/search/selection.py: what selects is not what reports, in network, noise and prompts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffpress.compress.builtin import FEATURES, SELECTION_FEATURES
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.evaluation import evaluate
from diffpress.compress.evaluation.subject import EvaluationSubject
from diffpress.compress.search.selection import check_features, open_selection, selecting_network, split_prompts
from diffpress.compress.search.settings import Bounds, SearchSettings
from diffpress.compress.seeds import EVALUATION_SEED, SELECTION_DRAW
from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import Network
from diffpress.runtime.spec import DenoiserSpec

SETTINGS = SearchSettings(engine="onnxruntime", train_steps=9, samples=8)


@pytest.fixture
def spec(unet: Checkpoint) -> DenoiserSpec:
    return replace(unet.spec, sample_shape=(1, 28, 28), conditioning=Conditioning())


class Flat:
    """A network that predicts zero."""

    name = "flat"
    inputs = {"sample": np.dtype(np.float32), "timestep": np.dtype(np.int64)}

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return np.zeros_like(inputs["sample"])


def test_two_networks_are_built_in_for_small_grey_images_and_none_for_others(
    spec: DenoiserSpec, unet: Checkpoint
) -> None:
    found = selecting_network(SETTINGS, spec)
    assert found is not None and found[0] == SELECTION_FEATURES != FEATURES
    assert selecting_network(SETTINGS, unet.spec) is None


def test_the_network_that_reports_is_refused_as_the_one_that_selects(spec: DenoiserSpec, tmp_path: Path) -> None:
    same = shutil.copyfile(FEATURES, tmp_path / "another_name.onnx")
    with pytest.raises(InvalidInputError, match="is the network that reports"):
        check_features(SETTINGS.model_copy(update={"select_features": same}), spec)
    check_features(SETTINGS.model_copy(update={"select_features": SELECTION_FEATURES}), spec)


def test_a_bound_that_no_features_can_measure_is_refused(unet: Checkpoint) -> None:
    bounded = SETTINGS.model_copy(update={"bounds": Bounds(max_frechet_ratio=1.1)})
    with pytest.raises(InvalidInputError, match="--max-frechet-ratio: no built-in features fit"):
        check_features(bounded, unet.spec)
    check_features(SETTINGS, unet.spec)


@pytest.mark.parametrize("name", ["reference", "select_reference"])
def test_real_images_without_their_network_are_refused(unet: Checkpoint, npz: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="belongs to --"):
        check_features(SETTINGS.model_copy(update={name: npz}), unet.spec)


def test_prompts_are_divided_between_selecting_and_reporting(spec: DenoiserSpec, tmp_path: Path) -> None:
    text = replace(spec, conditioning=Conditioning("text", encoders=("an encoder",)))  # type: ignore[arg-type]
    file = tmp_path / "p.txt"
    file.write_text("a\nb\nc\nd\ne\n")
    selecting, reporting = split_prompts(SETTINGS.model_copy(update={"prompts": file}), text)
    assert (selecting, reporting) == (("b", "d"), ("a", "c", "e"))
    file.write_text("a\n")
    with pytest.raises(InvalidInputError, match="at least two"):
        split_prompts(SETTINGS.model_copy(update={"prompts": file}), text)
    with pytest.raises(InvalidInputError, match="encodes no prompts"):
        split_prompts(SETTINGS.model_copy(update={"prompts": file}), spec)


def test_selection_samples_from_other_noise_than_an_evaluation(
    spec: DenoiserSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    generate = evaluate.generate_batches  # type: ignore[attr-defined]

    def recorded(network: Network, spec: DenoiserSpec, seeds: np.ndarray, **settings: object) -> object:
        seen.extend(map(int, seeds))
        return generate(network, spec, seeds, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "generate_batches", recorded)
    subject = EvaluationSubject(Flat(), spec)  # type: ignore[arg-type]
    selection = open_selection(SETTINGS, spec, subject)
    assert selection is not None and selection.ratio(subject) == 1.0
    assert selection.features.name == SELECTION_FEATURES.name
    assert set(seen) == set(range((SELECTION_DRAW + 1) * EVALUATION_SEED, (SELECTION_DRAW + 1) * EVALUATION_SEED + 8))
