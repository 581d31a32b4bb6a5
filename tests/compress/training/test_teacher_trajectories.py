"""compress/training/teacher_trajectories.py: the sampler's states, generated once, read by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.training import distributed, teacher_trajectories
from diffpress.compress.training.teacher_data import Tensors
from diffpress.compress.training.teacher_trajectories import TeacherTrajectories
from diffpress.runtime.denoiser import make_denoiser
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import class_conditioning
from diffpress.runtime.sampler import generate, noise_for, sample


@pytest.fixture
def paths_in(unet: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TeacherTrajectories]:
    monkeypatch.setattr(teacher_trajectories, "ROWS_PER_FILE", 4)

    def make(count: int = 6, kept: tuple[int, ...] = (0, 2), folder: Path = tmp_path / "paths") -> TeacherTrajectories:
        cond = class_conditioning(unet.spec, np.arange(count) % 3)
        return TeacherTrajectories(unet, unet.spec.plan, kept, count, cond, 50, folder)

    return make


def drawn(paths: TeacherTrajectories, size: int = 64) -> tuple[torch.Tensor, Tensors]:
    return paths.batch(size, torch.Generator().manual_seed(0))


def record_spans(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """Record from now on which trajectories are generated, in the returned list."""
    generated: list[range] = []
    original = TeacherTrajectories._sample

    def recorded_sample(self: TeacherTrajectories, network: TorchNetwork, span: range) -> np.ndarray:
        generated.append(span)
        return original(self, network, span)

    monkeypatch.setattr(TeacherTrajectories, "_sample", recorded_sample)
    return generated


def test_trajectories_are_the_states_of_the_sampler(
    paths_in: Callable[..., TeacherTrajectories], unet: Checkpoint
) -> None:
    states, cond = drawn(paths_in())
    labels = np.arange(6) % 3
    network = TorchNetwork(unet.model, unet.spec)
    noise = noise_for(range(50, 56), unet.spec.sample_shape)
    conditioning = class_conditioning(unet.spec, labels)
    denoise = make_denoiser(network, unet.spec, conditions=conditioning, clip=unet.spec.plan.clip)
    steps = list(sample(denoise, noise, unet.spec.schedule, unet.spec.plan))
    ends = generate(network, unet.spec, range(50, 56), labels)
    for path, label in zip(states.numpy(), cond["class_labels"].tolist(), strict=True):
        i = next(i for i in range(6) if np.allclose(path[0], noise[i], atol=1e-6))
        assert label == labels[i]
        np.testing.assert_allclose(path[1], steps[1].x[i], atol=1e-5)
        np.testing.assert_allclose(path[2], ends[i], atol=1e-5)


def test_only_missing_files_are_generated_again(
    paths_in: Callable[..., TeacherTrajectories], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = drawn(paths_in())
    assert len(list(paths_in().folder.iterdir())) == 2
    (paths_in().folder / paths_in()._name(range(4, 6))).unlink()
    generated = record_spans(monkeypatch)
    again, _ = drawn(paths_in())
    assert generated == [range(4, 6)] and torch.equal(before, again)
    drawn(paths_in(count=9))  # more trajectories: complete files are reused
    assert generated[1:] == [range(4, 8), range(8, 9)]


def test_rows_stay_on_disk(paths_in: Callable[..., TeacherTrajectories]) -> None:
    paths = paths_in()
    drawn(paths)
    assert all(isinstance(rows, np.memmap) for rows in paths._files)


def test_other_steps_have_other_files_and_a_broken_one_is_named_in_the_error(
    paths_in: Callable[..., TeacherTrajectories],
) -> None:
    drawn(paths_in())
    states, _ = drawn(paths_in(kept=()))
    assert states.shape[1] == 1 and len(list(paths_in().folder.iterdir())) == 4
    file = next(paths_in().folder.iterdir())
    file.write_bytes(b"nothing")
    with pytest.raises(InvalidInputError, match=rf"{file.name}: cannot be read .* delete it") as refusal:
        drawn(paths_in()), drawn(paths_in(kept=()))
    assert "\n" not in str(refusal.value)


def test_each_process_generates_a_share_and_then_what_is_missing(
    paths_in: Callable[..., TeacherTrajectories], monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = record_spans(monkeypatch)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "index", lambda: 1)
    generated_at_wait: list[int] = []
    monkeypatch.setattr(distributed, "wait", lambda: generated_at_wait.append(len(generated)))
    paths_in(count=10).generate()
    # the second of three files, before waiting for the other process
    assert generated[: generated_at_wait[0]] == [range(4, 8)]
    # the other process is simulated and generated nothing, so these are missing
    assert set(generated[1:]) == {range(0, 4), range(8, 10)}
