"""compress/training/resume.py: state is read back as written, completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from diffpress.compress.training.resume import read_state, write_state
from diffpress.runtime.errors import InvalidInputError

WHAT = "state of something"


def test_state_is_read_back_with_tied_and_transposed_tensors(tmp_path: Path) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    written = {"values": values, "tied": values, "transposed": values.T, "scalar": torch.tensor(7)}
    write_state(tmp_path / "new" / "state.safetensors", written, {"step": "3"}, WHAT)
    found = read_state(tmp_path / "new" / "state.safetensors", WHAT)
    assert found is not None
    tensors, metadata = found
    assert metadata == {"step": "3"} and tensors.keys() == written.keys()
    assert all(torch.equal(tensors[name], value) for name, value in written.items())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["state.safetensors"]


def test_a_missing_file_reads_as_none(tmp_path: Path) -> None:
    assert read_state(tmp_path / "state.safetensors", WHAT) is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_keeps_the_previous_file(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.safetensors"
    write_state(file, {"x": torch.ones(3)}, {}, WHAT)

    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("diffpress.compress.training.resume.save_file", full)
    with pytest.raises(
        InvalidInputError, match=rf"state\.safetensors: the {WHAT} cannot be saved \(.*\); free disk space"
    ) as caught:
        write_state(file, {"x": torch.zeros(3)}, {}, WHAT)
    assert "\n" not in str(caught.value)
    kept = read_state(file, WHAT)
    assert kept is not None and torch.equal(kept[0]["x"], torch.ones(3))


def test_an_unreadable_file_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"not at all")
    with pytest.raises(InvalidInputError, match=rf"state\.safetensors: the saved {WHAT} cannot be read .*; delete it"):
        read_state(tmp_path / "state.safetensors", WHAT)
