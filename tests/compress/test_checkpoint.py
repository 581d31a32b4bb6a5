"""compress/checkpoint.py: checkpoints round-trip, are written atomically, and contain no pickle."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization, Record, save_checkpoint, write_folder
from diffpress.compress.context import Context
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError

ROOT = Path(__file__).parents[2]
KINDS = ["plain", "unet", "pruned", "quantized"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_loads_with_the_same_hash_and_outputs(
    kind: str, request: pytest.FixtureRequest, output: Callable[[Checkpoint], torch.Tensor], tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(kind)
    save_checkpoint(checkpoint, tmp_path / "saved")
    loaded = load_checkpoint(tmp_path / "saved")
    assert loaded.hash == checkpoint.hash and loaded.spec == checkpoint.spec
    assert torch.equal(output(loaded), output(checkpoint))


def test_a_loaded_checkpoint_saves_to_the_same_hash(quantized: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(quantized, tmp_path / "one")
    save_checkpoint(load_checkpoint(tmp_path / "one"), tmp_path / "two")
    assert load_checkpoint(tmp_path / "two").hash == quantized.hash
    assert (tmp_path / "one" / "diffpress.json").read_text() == (tmp_path / "two" / "diffpress.json").read_text()


def test_the_history_is_saved_with_the_checkpoint(plain: Checkpoint, tmp_path: Path) -> None:
    record = Record("prune", {"ratio": 0.3}, 7, {"parameters": [10, 7]}, "a" * 64, "b" * 64, 1.5)
    save_checkpoint(plain.evolve(history=(record,)), tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved").history == (record,)


def test_a_pruned_checkpoint_reloads_in_a_fresh_process_without_pickle(quantized: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(quantized, tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    program = """
import pickle, sys, torch
from diffpress.compress.sources.load import load_checkpoint
def refuse(*args, **kwargs): raise AssertionError("something was unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
print(load_checkpoint(sys.argv[1]).hash)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "saved")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == quantized.hash, done.stderr


def test_the_hash_covers_weights_plan_and_scales_but_not_the_history(quantized: Checkpoint) -> None:
    assert quantized.quantization is not None
    amax = quantized.quantization.amax
    changed = {name: value * (2 if i == 0 else 1) for i, (name, value) in enumerate(sorted(amax.items()))}
    moved: Any = quantized.clone_model()
    with torch.no_grad():
        moved.conv_in.weight[0, 0, 0, 0] += 1e-6
    hashes = {
        quantized.hash,
        quantized.evolve(model=moved).hash,
        quantized.evolve(spec=quantized.spec.with_plan(replace(quantized.spec.plan, eta=0.5))).hash,
        quantized.evolve(quantization=Quantization("int8", changed)).hash,
        quantized.evolve(quantization=None).hash,
    }
    assert len(hashes) == 5
    assert quantized.evolve(history=(Record("x", {}, 0, {}, "", ""),)).hash == quantized.hash


def test_a_checkpoint_is_frozen_and_its_clone_is_a_copy(plain: Checkpoint) -> None:
    with pytest.raises(FrozenInstanceError):
        plain.model = None  # type: ignore[misc, assignment]
    before = plain.hash
    model: Any = plain.clone_model()
    nn.init.zeros_(model.conv_in.weight)
    assert plain.evolve().hash == before  # evolve, because the hash is cached


def test_an_evolved_checkpoint_computes_its_own_hash(plain: Checkpoint) -> None:
    model: Any = plain.clone_model()
    checkpoint = plain.evolve(model=model)
    assert checkpoint.hash == plain.hash
    nn.init.zeros_(model.conv_in.weight)
    assert checkpoint.evolve().hash != plain.hash == plain.evolve().hash


def test_a_shared_model_has_separate_modules_with_the_same_tensors(plain: Checkpoint) -> None:
    shared: Any = plain.shared_model()
    assert not {id(module) for module in shared.modules()} & {id(module) for module in plain.model.modules()}
    ours, theirs = plain.model.state_dict(keep_vars=True), shared.state_dict(keep_vars=True)
    assert list(ours) == list(theirs) and all(theirs[name] is ours[name] for name in ours)
    shared.conv_in.register_forward_hook(lambda *_: pytest.fail("a hook on the copy was called"))
    shared.conv_out = nn.Identity()
    with torch.no_grad():
        assert plain.model(torch.zeros(1, 1, 8, 8), torch.tensor([1])).sample.shape == (1, 1, 8, 8)


def test_saving_over_a_checkpoint_replaces_it(plain: Checkpoint, unet: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(plain, tmp_path / "saved")
    save_checkpoint(unet, tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved").hash == unet.hash
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1)
        self.second.weight = self.first.weight
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(sample) + self.second(sample))


def test_tied_weights_are_saved(custom: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = custom(Tied())
    save_checkpoint(checkpoint, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "weights.safetensors")
    assert torch.equal(stored["first.weight"], stored["second.weight"])


# --- custom modules --------------------------------------------------------------------------------------------


def test_a_saved_custom_checkpoint_loads_with_its_file(
    custom_files: Callable[..., tuple[Path, Path]],
    context: Callable[..., Context],
    output: Callable[[Checkpoint], torch.Tensor],
    tmp_path: Path,
) -> None:
    file, weights = custom_files("v")
    loaded = load_checkpoint(f"{file}:{weights}")
    small = prune(loaded, PruneConfig(ratio=0.5, round_to=4, batch=4, timesteps=2), context(loaded))
    assert small.hash != loaded.hash
    save_checkpoint(small, tmp_path / "saved")
    weights.unlink()  # the saved folder is self-contained
    again = load_checkpoint(f"{file}:{tmp_path / 'saved'}")
    assert again.hash == small.hash and torch.equal(output(again), output(small))
    with pytest.raises(InvalidInputError, match=r"custom module; load it as FILE\.py:.*saved"):
        load_checkpoint(tmp_path / "saved")


def test_a_custom_checkpoint_with_a_weights_folder_loads_after_saving(
    custom_files: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    file, weights = custom_files("v")
    folder = tmp_path / "mine"
    folder.mkdir()
    weights.rename(folder / "model.safetensors")
    file.write_text(file.read_text().replace("load_file(path)", "load_file(path / 'model.safetensors')"))
    loaded = load_checkpoint(f"{file}:{folder}")
    save_checkpoint(loaded, tmp_path / "saved")
    assert load_checkpoint(f"{file}:{tmp_path / 'saved'}").hash == loaded.hash


LAYERS_FILE = """
import torch
from torch import nn
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.batch = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 2, stride=2)
        self.up, self.tokens = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Linear(8, 16)
        self.layer, self.back = nn.LayerNorm(16), nn.Linear(16, 8)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, sample, timestep):
        x = self.up(torch.tanh(self.down(torch.tanh(self.batch(self.first(sample))))))
        x = self.back(torch.tanh(self.layer(self.tokens(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.last(x)


def load(path):
    torch.manual_seed(0)
    schedule = betas_schedule("linear", 50)
    return Mixed(), DenoiserSpec("epsilon", schedule, (1, 8, 8), make_plan("ddim", 3, schedule))
"""


def test_pruned_layers_of_every_kind_reload_with_the_same_outputs(
    context: Callable[..., Context], output: Callable[[Checkpoint], torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "mixed.py").write_text(LAYERS_FILE)
    (tmp_path / "weights").write_bytes(b"")
    loaded = load_checkpoint(f"{tmp_path / 'mixed.py'}:{tmp_path / 'weights'}")
    small = prune(loaded, PruneConfig(method="magnitude", ratio=0.5, round_to=1), context(loaded))
    save_checkpoint(small, tmp_path / "small")
    again = load_checkpoint(f"{tmp_path / 'mixed.py'}:{tmp_path / 'small'}")
    assert again.hash == small.hash and torch.equal(output(again), output(small))
    assert again.model.state_dict()["batch.running_var"].shape == (4,)


# --- atomic writes ---------------------------------------------------------------------------------------------


def full_disk(tensors: dict[str, torch.Tensor], path: Path, *args: Any, **kwargs: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_safetensors(tensors: dict[str, torch.Tensor], path: Path, *args: Any, **kwargs: Any) -> NoReturn:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [full_disk, full_disk_in_safetensors])
def test_a_full_disk_raises_a_one_line_error_and_keeps_the_old_checkpoint(
    failure: Callable[..., NoReturn],
    plain: Checkpoint,
    unet: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_checkpoint(plain, tmp_path / "saved")
    monkeypatch.setattr("diffpress.compress.checkpoint.save_file", failure)
    with pytest.raises(InvalidInputError, match=r"saved: cannot be written .*No space left"):
        save_checkpoint(unet, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert load_checkpoint(tmp_path / "saved").hash == plain.hash


def test_a_read_only_folder_is_refused(plain: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("diffpress.compress.checkpoint.Path.replace", refuse)
    with pytest.raises(InvalidInputError, match=r"saved: cannot be written .*Read-only"):
        save_checkpoint(plain, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_refused(plain: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidInputError, match="saved: cannot be written"):
        save_checkpoint(plain, tmp_path / "file" / "saved")


def test_an_error_while_writing_leaves_no_partial_folder(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        save_file({"x": torch.zeros(3)}, folder / "x.safetensors")
        raise InvalidInputError("something else")

    with pytest.raises(InvalidInputError, match="something else"):
        write_folder(tmp_path / "saved", fill)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed(plain: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / ".saved.partial").mkdir()
    (tmp_path / ".saved.partial" / "junk").write_text("junk")
    save_checkpoint(plain, tmp_path / "saved")
    assert not (tmp_path / "saved" / "junk").exists() and load_checkpoint(tmp_path / "saved").hash == plain.hash
