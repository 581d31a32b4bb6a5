"""compress/training/teacher_data.py: the teacher's samples, their conditioning and their cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.components import encode_prompts
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.seeds import TEACHER_DATA_SEED
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.teacher_data import TeacherData, Tensors, read_prompts
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.requested_plan import requested_plan
from diffpress.runtime.sampler import generate

PROMPTS = ("a cat", "red dog")


@pytest.fixture
def teacher(tiny_folder: Callable[..., Path]) -> Callable[..., Checkpoint]:
    """Load the checkpoint of a tiny pipeline with a plan of two steps."""

    def load(kind: str, guidance: float | None = None) -> Checkpoint:
        found = load_checkpoint(tiny_folder(kind))
        return found.evolve(spec=found.spec.with_plan(requested_plan(found.spec, 2, None, None, guidance)))

    return load


@pytest.fixture
def text_data(teacher: Callable[..., Checkpoint], tmp_path: Path) -> TeacherData:
    return TeacherData(teacher("sd"), 3, tmp_path / "cache", PROMPTS)


def drawn(data: TeacherData, seed: int = 0, size: int = 8) -> tuple[torch.Tensor, Tensors]:
    return data.batch(size, torch.Generator().manual_seed(seed))


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_samples_are_those_of_the_teacher_under_its_prompts(text_data: TeacherData) -> None:
    conditioning, teacher = text_data.conditions(3), text_data.teacher
    network = TorchNetwork(teacher.model, teacher.spec)
    expected = generate(network, teacher.spec, range(TEACHER_DATA_SEED, TEACHER_DATA_SEED + 3), conditions=conditioning)
    samples, cond = drawn(text_data)
    states = torch.from_numpy(conditioning.cond["encoder_hidden_states"])
    for sample, words in zip(samples, cond["encoder_hidden_states"], strict=True):
        # each sample comes with its own prompt
        index = next(i for i in range(3) if np.array_equal(expected[i], sample))
        assert torch.equal(states[index], words)


def test_prompts_are_used_in_turn_with_the_empty_prompt_as_uncond(
    text_data: TeacherData, caplog: pytest.LogCaptureFixture
) -> None:
    cond = text_data.conditions(3)
    one = encode_prompts(text_data.teacher, PROMPTS)["encoder_hidden_states"]
    uncond = encode_prompts(text_data.teacher, None)["encoder_hidden_states"]
    assert not caplog.messages  # no prompt was truncated
    np.testing.assert_array_equal(cond.cond["encoder_hidden_states"], one[[0, 1, 0]])
    assert cond.uncond is not None
    np.testing.assert_array_equal(cond.uncond["encoder_hidden_states"], uncond[[0, 0, 0]])
    np.testing.assert_array_equal(text_data.uncond["encoder_hidden_states"], uncond)


def test_without_guidance_there_is_no_uncond(teacher: Callable[..., Checkpoint], tmp_path: Path) -> None:
    data = TeacherData(teacher("sd", guidance=1.0), 2, tmp_path, PROMPTS)
    assert data.conditions(2).uncond is None and data.uncond == {}


def test_the_same_seed_draws_the_same_batch_and_another_does_not(text_data: TeacherData) -> None:
    one, again, other = drawn(text_data), drawn(text_data), drawn(text_data, seed=1)
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0])
    assert all(torch.equal(one[1][name], again[1][name]) for name in one[1])


def test_cached_samples_are_not_generated_again(text_data: TeacherData, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, _ = drawn(text_data)
    (file,) = text_data.cache.iterdir()

    def fail(*_: object) -> None:
        pytest.fail("sampled again")

    monkeypatch.setattr("diffpress.compress.training.teacher_trajectories.TeacherTrajectories._generate", fail)
    again = TeacherData(text_data.teacher, 3, text_data.cache, PROMPTS)
    assert torch.equal(drawn(again)[0], samples)
    file.write_bytes(b"nothing")
    broken = TeacherData(text_data.teacher, 3, text_data.cache, PROMPTS)
    refused(lambda: drawn(broken), str(file), "delete it")


def test_the_hash_follows_the_teacher_the_prompts_and_their_number(
    teacher: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    data = [
        TeacherData(teacher("sd"), 3, tmp_path, PROMPTS),
        TeacherData(teacher("sd"), 4, tmp_path, PROMPTS),
        TeacherData(teacher("sd"), 3, tmp_path, PROMPTS[::-1]),
        TeacherData(teacher("sd2-v"), 3, tmp_path, PROMPTS),
        TeacherData(teacher("sd", guidance=2.0), 3, tmp_path, PROMPTS),
    ]
    assert len({one.hash for one in data}) == len(data)
    assert data[0].hash == TeacherData(teacher("sd"), 3, tmp_path / "elsewhere", PROMPTS).hash


def test_classes_are_used_in_turn_with_the_null_label_as_uncond(
    teacher: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    data = TeacherData(teacher("dit"), 3, tmp_path)
    conditioning = data.conditions(3)
    assert conditioning.cond["class_labels"].tolist() == [0, 1, 2] and data.uncond["class_labels"].tolist() == [1000]
    samples, cond = drawn(data)
    assert samples.shape == (8, 4, 8, 8) and cond["class_labels"].dtype == torch.int64


def test_an_unconditional_model_gets_no_conditioning(teacher: Callable[..., Checkpoint], tmp_path: Path) -> None:
    samples, cond = drawn(TeacherData(teacher("ldm"), 2, tmp_path))
    assert samples.shape == (8, 3, 8, 8) and samples.isfinite().all() and cond == {}


def test_noise_replaces_prompts_if_there_is_no_text_encoder(
    tiny_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unet_only = load_checkpoint(tiny_folder("sd") / "unet")
    with caplog.at_level("INFO", logger="diffpress"):
        cond = TeacherData(unet_only, 2, tmp_path, PROMPTS).conditions(2)
    assert cond.cond["encoder_hidden_states"].std() > 0.9
    assert "without its text encoders" in caplog.text


# --- prompts ---------------------------------------------------------------------------------------------------


def test_prompts_are_the_nonempty_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n  a cat \n\n雪\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ("a cat", "雪")
    assert len(read_prompts(None)) == 200


@pytest.mark.parametrize(("content", "word"), [(b"\n \n", "no prompts"), (b"\xff\xfe\x00", "not readable")])
def test_a_file_without_prompts_is_refused(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    refused(lambda: read_prompts(tmp_path / "prompts.txt"), str(tmp_path), word)


def test_a_missing_file_of_prompts_is_refused(tmp_path: Path) -> None:
    refused(lambda: read_prompts(tmp_path / "gone.txt"), "gone.txt")
