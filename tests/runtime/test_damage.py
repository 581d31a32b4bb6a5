"""Damaged bundles: one clear error line for each, never a traceback, a wrong engine or a wrong image.

Manifests are damaged in two ways: as by disks and editors, which the hash detects, and with a matching new hash, where
each entry has to be validated.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import MANIFEST, load_bundle, manifest_hash, seal
from diffpress.runtime.engines import available
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import DiffpressError, InvalidInputError
from diffpress.runtime.pipeline import Pipeline

COUNT = 100
EntryPath = tuple[str | int, ...]
BytesDamage = Callable[[bytes, random.Random], bytes]
EntryDamage = Callable[[Any, random.Random], None]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with everything a manifest can have: a variant, a second graph, a built engine."""
    folder = Path(shutil.copytree(Path(__file__).parent / "tiny_bundle", tmp_path_factory.mktemp("intact") / "bundle"))
    manifest = json.loads((folder / MANIFEST).read_text())
    shutil.copy(folder / "denoiser.onnx", folder / "denoiser.float.onnx")
    shutil.copy(folder / "denoiser.onnx", folder / "vae_decoder.onnx")
    (folder / "engines").mkdir()
    (folder / "engines" / "denoiser.engine").write_bytes(bytes(range(256)))
    sample = {"dtype": "float32", "shape": ["batch", 1, 8, 8]}
    manifest["graphs"]["denoiser"] |= {
        "inputs": {"sample": sample},
        "precision": "int8",
        "quantized_layers": ["conv"],
        "variants": {"openvino": {"file": "denoiser.float.onnx", "precision": "fp32", "bytes": 1}},
    }
    manifest["graphs"]["vae_decoder"] = {"file": "vae_decoder.onnx", "inputs": {"latent_sample": sample}}
    manifest["engines"] = [
        {"engine": "openvino", "version": "1", "graph": "denoiser.onnx"},
        {"engine": "tensorrt", "version": "1", "graph": "denoiser.onnx", "file": "engines/denoiser.engine"},
    ]
    seal(folder, {key: value for key, value in manifest.items() if key not in ("format", "files", "hash")})
    return folder


def image(folder: Path, engine: str = "onnxruntime") -> np.ndarray:
    """Sample two images as `diffpress sample` does."""
    with closing(Pipeline(load_bundle(folder), engine, options=EngineOptions(threads=1))) as pipeline:
        return np.concatenate(list(pipeline.images([3, 4], pipeline.conditions(2))))


def outcome(folder: Path, engine: str = "onnxruntime") -> np.ndarray | str:
    """Return the images or the one-line error; any other exception is a defect."""
    try:
        return image(folder, engine)
    except DiffpressError as error:
        message = str(error)
        assert isinstance(error, InvalidInputError) and "\n" not in message and len(message) > 20, repr(error)  # noqa: PT017
        return message


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zeroed(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]


BYTES = [flipped, cut, zeroed]


def entry_paths(value: Any, path: EntryPath = ()) -> Iterator[EntryPath]:
    """Yield the path of every entry of a JSON value; of long lists only the first few."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:5]) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from entry_paths(inner, (*path, key))


def at(value: Any, path: EntryPath) -> Any:
    for key in path:
        value = value[key]
    return value


def removed(manifest: Any, rng: random.Random) -> None:
    *path, last = rng.choice(list(entry_paths(manifest)))
    del at(manifest, tuple(path))[last]


NUMBERS = [True, -1, 0, 7, 10**30, 1e308, float("inf"), float("nan")]
REPLACEMENTS: list[Any] = [*NUMBERS, None, "", "x", "../x", "denoiser.onnx", [], [1], [[]], {}, {"x": 1}]


def retyped(manifest: Any, rng: random.Random) -> None:
    *path, last = rng.choice(list(entry_paths(manifest)))
    at(manifest, tuple(path))[last] = rng.choice(REPLACEMENTS)


def swapped(manifest: Any, rng: random.Random) -> None:
    first, second = rng.sample(list(entry_paths(manifest)), 2)
    a, b = json.loads(json.dumps([at(manifest, first), at(manifest, second)]))
    at(manifest, first[:-1])[first[-1]] = b
    with suppress(KeyError, IndexError, TypeError):  # the second entry was inside the first
        at(manifest, second[:-1])[second[-1]] = a


def renamed(manifest: Any, rng: random.Random) -> None:
    *path, last = rng.choice([entry for entry in entry_paths(manifest) if isinstance(entry[-1], str)])
    inner = at(manifest, tuple(path))
    inner[f"{last}x"] = inner.pop(last)


ENTRIES = [removed, retyped, swapped, renamed]


@pytest.fixture
def working_copy(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def expected(intact: Path) -> np.ndarray:
    return image(intact)


def test_the_intact_bundle_samples_and_has_every_optional_entry(intact: Path, expected: np.ndarray) -> None:
    assert expected.shape == (2, 1, 8, 8)
    bundle = load_bundle(intact)
    assert bundle.prebuilt_engines("denoiser", "tensorrt")[0].file.name == "denoiser.engine"
    assert bundle.graph("denoiser", "openvino").name == "denoiser.float.onnx"


@pytest.mark.parametrize("damage", BYTES)
def test_changed_manifest_bytes_are_detected(
    intact: Path, working_copy: Path, expected: np.ndarray, damage: BytesDamage
) -> None:
    """A change without meaning, such as in whitespace, gives the same image."""
    refused = 0
    for seed in range(COUNT):
        (working_copy / MANIFEST).write_bytes(damage((intact / MANIFEST).read_bytes(), random.Random(seed)))
        found = outcome(working_copy)
        refused += isinstance(found, str)
        assert isinstance(found, str) or np.array_equal(found, expected), seed
    assert refused > 0.8 * COUNT


@pytest.mark.parametrize("damage", ENTRIES)
def test_changed_manifest_entries_are_detected(intact: Path, working_copy: Path, damage: EntryDamage) -> None:
    before = json.loads((intact / MANIFEST).read_text())
    for seed in range(COUNT):
        manifest = json.loads(json.dumps(before))
        damage(manifest, random.Random(seed))
        (working_copy / MANIFEST).write_text(json.dumps(manifest))
        assert manifest == before or isinstance(outcome(working_copy), str), seed


@pytest.mark.parametrize("damage", ENTRIES)
def test_a_changed_manifest_with_a_matching_hash_is_refused_or_valid(
    intact: Path, working_copy: Path, damage: EntryDamage
) -> None:
    """Another name or guidance makes another valid bundle; invalid entries give an error line."""
    refused, before = 0, json.loads((intact / MANIFEST).read_text())
    for seed in range(COUNT):
        manifest = json.loads(json.dumps(before))
        damage(manifest if seed % 3 else manifest["spec"], random.Random(seed))
        manifest["hash"] = manifest_hash(manifest)
        (working_copy / MANIFEST).write_text(json.dumps(manifest))
        refused += isinstance(outcome(working_copy), str)
    assert refused > 0.2 * COUNT


@pytest.mark.parametrize("damage", BYTES)
def test_damaged_graphs_and_engines_are_refused(intact: Path, working_copy: Path, damage: BytesDamage) -> None:
    files = sorted(path.relative_to(intact) for path in intact.rglob("*") if path.is_file() and path.name != MANIFEST)
    for seed in range(COUNT):
        rng = random.Random(seed)
        file = rng.choice(files)
        content = (intact / file).read_bytes()
        (working_copy / file).write_bytes(damaged := damage(content, rng))
        found = outcome(working_copy)
        assert damaged == content or (isinstance(found, str) and file.name in found), seed
        (working_copy / file).write_bytes(content)


def test_swapped_files_are_refused(intact: Path, working_copy: Path) -> None:
    (working_copy / "denoiser.onnx").write_bytes((intact / "engines" / "denoiser.engine").read_bytes())
    assert "denoiser.onnx: does not match its sha256" in str(outcome(working_copy))
    (working_copy / "denoiser.onnx").write_bytes((intact / "denoiser.onnx").read_bytes())
    assert not isinstance(outcome(working_copy), str)
    (working_copy / "engines" / "denoiser.engine").write_bytes((intact / "denoiser.onnx").read_bytes())
    assert "denoiser.engine: does not match its sha256" in str(outcome(working_copy))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_graph_damaged_before_sealing_gives_one_error_line_or_a_valid_graph(
    engine: str, intact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hash matches, so the engine has to report the damage in one line and must not crash."""
    if engine not in available():
        pytest.skip(f"{engine} is not installed")
    manifest = json.loads((Path(__file__).parent / "tiny_bundle" / MANIFEST).read_text())
    content, refused = (intact / "denoiser.onnx").read_bytes(), 0
    for seed in range(COUNT // 2):
        rng = random.Random(seed)
        (tmp_path / "denoiser.onnx").write_bytes(rng.choice(BYTES)(content, rng))
        seal(tmp_path, {key: value for key, value in manifest.items() if key not in ("format", "files", "hash")})
        refused += isinstance(outcome(tmp_path, engine), str)
    assert 0 < refused < COUNT // 2
