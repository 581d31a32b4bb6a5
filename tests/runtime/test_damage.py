"""Damaged bundles: a clear line for each, never a traceback, another engine or another image.

A manifest is damaged as disks and editors do it, which its hash shows, and as someone does who makes a new hash, which
shows nothing: then what it says is checked word by word.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
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


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """The tiny bundle with all that a manifest can have: a variant, a second graph, a plan for another engine."""
    folder = Path(shutil.copytree(Path(__file__).parent / "tiny_bundle", tmp_path_factory.mktemp("sound") / "bundle"))
    manifest = json.loads((folder / MANIFEST).read_text())
    shutil.copy(folder / "denoiser.onnx", folder / "denoiser.float.onnx")
    shutil.copy(folder / "denoiser.onnx", folder / "vae_decoder.onnx")
    (folder / "engines").mkdir()
    (folder / "engines" / "denoiser.plan").write_bytes(bytes(range(256)))
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
        {"engine": "tensorrt", "version": "1", "graph": "denoiser.onnx", "file": "engines/denoiser.plan"},
    ]
    seal(folder, {key: value for key, value in manifest.items() if key not in ("format", "files", "hash")})
    return folder


def image(folder: Path, engine: str = "onnxruntime") -> np.ndarray:
    """What `diffpress sample` makes of it."""
    with closing(Pipeline(load_bundle(folder), engine, options=EngineOptions(threads=1))) as pipeline:
        return np.concatenate(list(pipeline.images([3, 4], pipeline.conditions(2))))


def outcome(folder: Path, engine: str = "onnxruntime") -> np.ndarray | str:
    """The images, or the one line that says why there are none; anything else that is raised is a defect."""
    try:
        return image(folder, engine)
    except DiffpressError as error:
        assert isinstance(error, InvalidInputError) and "\n" not in str(error) and len(str(error)) > 20, repr(error)
        return str(error)


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zeroed(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]


BYTES = [flipped, cut, zeroed]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every entry of a JSON value; of long lists of numbers the first few."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:5]) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def removed(manifest: Any, rng: random.Random) -> None:
    *path, last = rng.choice(list(places(manifest)))
    del at(manifest, tuple(path))[last]


NUMBERS = [True, -1, 0, 7, 10**30, 1e308, float("inf"), float("nan")]
OTHERS = [*NUMBERS, None, "", "x", "../x", "denoiser.onnx", [], [1], [[]], {}, {"x": 1}]


def retyped(manifest: Any, rng: random.Random) -> None:
    *path, last = rng.choice(list(places(manifest)))
    at(manifest, tuple(path))[last] = rng.choice(OTHERS)


def swapped(manifest: Any, rng: random.Random) -> None:
    first, second = rng.sample(list(places(manifest)), 2)
    a, b = json.loads(json.dumps([at(manifest, first), at(manifest, second)]))
    at(manifest, first[:-1])[first[-1]] = b
    try:
        at(manifest, second[:-1])[second[-1]] = a
    except (KeyError, IndexError, TypeError):
        pass  # the second place was inside the first


def renamed(manifest: Any, rng: random.Random) -> None:
    *path, last = rng.choice([place for place in places(manifest) if isinstance(place[-1], str)])
    inner = at(manifest, tuple(path))
    inner[last + "x"] = inner.pop(last)


ENTRIES = [removed, retyped, swapped, renamed]


@pytest.fixture
def work(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def wanted(sound: Path) -> np.ndarray:
    return image(sound)


def test_this_bundle_is_sound_and_none_of_its_parts_is_optional_here(sound: Path, wanted: np.ndarray) -> None:
    assert wanted.shape == (2, 1, 8, 8)
    bundle = load_bundle(sound)
    assert bundle.built("denoiser", "tensorrt")[0].file.name == "denoiser.plan"
    assert bundle.graph("denoiser", "openvino").name == "denoiser.float.onnx"


@pytest.mark.parametrize("damage", BYTES)
def test_bytes_of_the_manifest_that_changed_are_found(sound: Path, work: Path, wanted: np.ndarray, damage) -> None:
    """Unless they mean what they meant, as another space does: then it is the same image."""
    refused = 0
    for seed in range(COUNT):
        (work / MANIFEST).write_bytes(damage((sound / MANIFEST).read_bytes(), random.Random(seed)))
        found = outcome(work)
        refused += isinstance(found, str)
        assert isinstance(found, str) or np.array_equal(found, wanted), seed
    assert refused > 0.8 * COUNT


@pytest.mark.parametrize("damage", ENTRIES)
def test_entries_of_the_manifest_that_changed_are_found(sound: Path, work: Path, damage: Callable) -> None:
    before = json.loads((sound / MANIFEST).read_text())
    for seed in range(COUNT):
        manifest = json.loads(json.dumps(before))
        damage(manifest, random.Random(seed))
        (work / MANIFEST).write_text(json.dumps(manifest))
        assert manifest == before or isinstance(outcome(work), str), seed


@pytest.mark.parametrize("damage", ENTRIES)
def test_a_changed_manifest_with_a_hash_to_match_is_refused_or_makes_sense(sound: Path, work: Path, damage) -> None:
    """Another name or guidance is another bundle; what can mean nothing is a line."""
    refused, before = 0, json.loads((sound / MANIFEST).read_text())
    for seed in range(COUNT):
        manifest = json.loads(json.dumps(before))
        damage(manifest if seed % 3 else manifest["spec"], random.Random(seed))
        manifest["hash"] = manifest_hash(manifest)
        (work / MANIFEST).write_text(json.dumps(manifest))
        refused += isinstance(outcome(work), str)
    assert refused > 0.2 * COUNT


@pytest.mark.parametrize("damage", BYTES)
def test_damaged_graphs_and_engines_are_refused(sound: Path, work: Path, damage: Callable) -> None:
    files = sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file() and path.name != MANIFEST)
    for seed in range(COUNT):
        rng = random.Random(seed)
        file = rng.choice(files)
        content = (sound / file).read_bytes()
        (work / file).write_bytes(damaged := damage(content, rng))
        found = outcome(work)
        assert damaged == content or (isinstance(found, str) and file.name in found), seed
        (work / file).write_bytes(content)


def test_files_in_each_others_place_are_refused(sound: Path, work: Path) -> None:
    (work / "denoiser.onnx").write_bytes((sound / "engines" / "denoiser.plan").read_bytes())
    assert "denoiser.onnx: does not match its sha256" in str(outcome(work))
    (work / "denoiser.onnx").write_bytes((sound / "denoiser.onnx").read_bytes())
    assert not isinstance(outcome(work), str)
    (work / "engines" / "denoiser.plan").write_bytes((sound / "denoiser.onnx").read_bytes())
    assert "denoiser.plan: does not match its sha256" in str(outcome(work))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_graph_that_was_damaged_before_it_was_sealed_is_a_line_or_a_graph(
    engine: str, sound: Path, tmp_path: Path, capfd
) -> None:
    """Here no hash helps: the engine has to say it, on one line, and not to fall over."""
    if engine not in available():
        pytest.skip(f"{engine} is not installed")
    manifest = json.loads((Path(__file__).parent / "tiny_bundle" / MANIFEST).read_text())
    content, refused = (sound / "denoiser.onnx").read_bytes(), 0
    for seed in range(COUNT // 2):
        rng = random.Random(seed)
        (tmp_path / "denoiser.onnx").write_bytes(rng.choice(BYTES)(content, rng))
        seal(tmp_path, {key: value for key, value in manifest.items() if key not in ("format", "files", "hash")})
        refused += isinstance(outcome(tmp_path, engine), str)
    assert 0 < refused < COUNT // 2
