"""runtime/lora/safetensors_file.py: the arrays of the safetensors package, and damaged files refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.lora.safetensors_file import read_safetensors


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: list[Any] | None = None, start: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": [start, end]}


def test_it_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    tensors = {str(kind): (100 * torch.randn(3, 5)).to(kind) for kind in kinds} | {"one": torch.tensor(4.0)}
    tensors["none"] = torch.empty(0, 3)
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    found, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], (tensor.float() if tensor.dtype in kinds[2:4] else tensor).numpy())
    assert found["torch.bfloat16"].dtype == np.float32


DATA = np.array([1.0, 2.0], np.float32).tobytes()
DAMAGED = {
    "no JSON": (b"{nonsense", b""),
    "a list": (b"[1, 2]", b""),
    "nested too deeply": (b'{"a":' * 100_000, b""),
    "a name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), DATA),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA),
    "a negative shape": ({"a": entry(shape=[-2])}, DATA),
    "a shape that is no list": ({"a": entry(shape="2")}, DATA),  # type: ignore[arg-type]
    "a boolean shape": ({"a": entry(shape=[True, 2])}, DATA),
    "another size than its shape": ({"a": entry(shape=[3])}, DATA),
    "an enormous shape": ({"a": entry(shape=[2**62, 2**62])}, DATA),
    "offsets behind the end": ({"a": entry(end=12, shape=[3])}, DATA),
    "a gap": ({"a": entry(shape=[1], start=4)}, DATA),
    "an overlap": ({"a": entry(), "b": entry(shape=[1], start=4)}, DATA),
    "bytes that no tensor has": ({"a": entry(end=4, shape=[1])}, DATA),
    "an unknown dtype": ({"a": entry("F8_E4M3", shape=[8])}, DATA),
    "metadata that is no object": ({"a": entry(), "__metadata__": 3}, DATA),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", *DAMAGED[damage])
    with pytest.raises(InvalidInputError) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 4, 8, 20])
def test_a_file_that_is_cut_off_is_refused(length: int, tmp_path: Path) -> None:
    whole = write(tmp_path / "a.safetensors", {"a": entry()}, DATA).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:length])
    with pytest.raises(InvalidInputError, match="cut off"):
        read_safetensors(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02"])
def test_a_pickle_is_refused_as_one(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(start + bytes(100))
    with pytest.raises(InvalidInputError, match="pickle"):
        read_safetensors(tmp_path / "a.safetensors")
