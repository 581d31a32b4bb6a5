"""The kinds of files that the campaign `fuzz` changes, and how each is read and checked.

A kind makes a changed copy in a folder, and returns the action that reads it. The action writes what it loaded wrongly
to wrong.json.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.campaign.mutations import changed_bytes, changed_json, changed_message

Action = Callable[[], int]
WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
SEEDS = (3, 4)


class Trial(NamedTuple):
    """What was changed, in words, and the action that reads it."""

    change: str
    action: Action


def bundle_bytes(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """Any file of a bundle, without sealing it again."""
    bundle = Path(shutil.copytree(intact / "bundle", folder / "bundle"))
    file = rng.choice(sorted(path for path in bundle.rglob("*") if path.is_file()))
    file.write_bytes(changed_bytes(file.read_bytes(), rng))

    def action() -> int:
        found = samples(bundle)
        expect(np.array_equal(found, samples(intact / "bundle")), "a changed bundle gives other samples")
        return 0

    return Trial(f"bytes of {file.name}", reported(action))


def manifest(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """Entries of a manifest, sealed again."""
    name = rng.choice(("bundle", "bundle", "text_bundle"))
    bundle = Path(shutil.copytree(intact / name, folder / "bundle"))
    content = json.loads((bundle / "manifest.json").read_text())
    part = rng.choice(("spec", "graphs", None))
    if part is None:
        content = changed_json(content, rng)
    else:
        content[part] = changed_json(content[part], rng)
    write_manifest(bundle, content)
    words = ["info", bundle] if rng.random() < 0.3 else sample_words(bundle, name)
    return Trial(f"{part or 'entry'} of the manifest of {name}, {words[0]}", command(words))


def graph_bytes(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """Bytes of a graph, sealed again."""
    return _graph(intact, folder, rng, lambda data: changed_bytes(data, rng))


def graph_message(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """Fields of a graph's protobuf messages, sealed again."""

    def change(data: bytes) -> bytes:
        import onnx

        model = onnx.ModelProto.FromString(data)
        changed_message(model.graph if rng.random() < 0.8 else model, rng)
        return model.SerializeToString()

    return _graph(intact, folder, rng, change)


def _graph(intact: Path, folder: Path, rng: random.Random, change: Callable[[bytes], bytes]) -> Trial:
    name = rng.choice(("bundle", "bundle", "bundle", "text_bundle"))
    engine = rng.choice(("onnxruntime", "openvino"))
    bundle = Path(shutil.copytree(intact / name, folder / "bundle"))
    file = rng.choice(sorted(bundle.glob("*.onnx")))
    file.write_bytes(change(file.read_bytes()))
    seal_again(bundle)
    return Trial(f"{file.name} of {name} in {engine}", command(sample_words(bundle, name, engine)))


def tokenizer(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """A tokenizer.json of a bundle, sealed again."""
    bundle = Path(shutil.copytree(intact / "text_bundle", folder / "bundle"))
    file = bundle / "tokenizer" / "tokenizer.json"
    if rng.random() < 0.5:
        file.write_bytes(changed_bytes(file.read_bytes(), rng))
    else:
        file.write_text(json.dumps(changed_json(json.loads(file.read_text()), rng)))
    seal_again(bundle)
    return Trial("tokenizer.json", command(sample_words(bundle, "text_bundle")))


def safetensors(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """Header or bytes of a safetensors file of a pipeline."""
    pipeline = Path(shutil.copytree(intact / "pipeline", folder / "pipeline"))
    component = rng.choice(("unet", "unet", "vae", "text_encoder"))
    file = next((pipeline / component).glob("*.safetensors"))
    change_safetensors(file, rng)
    return Trial(f"safetensors of {component}", load_action(pipeline))


def checkpoint(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """diffpress.json or scales of a checkpoint that a run saved."""
    saved = Path(shutil.copytree(intact / "checkpoint", folder / "checkpoint"))
    name = rng.choice(("diffpress.json", "diffpress.json", "quantization.safetensors", "unet/config.json"))
    change_file(saved / name, rng)
    from tests.campaign.hostile import loaded

    return Trial(name, loaded(saved))


def configs(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """A JSON file of a pipeline."""
    pipeline = Path(shutil.copytree(intact / "pipeline", folder / "pipeline"))
    file = rng.choice(sorted(path for path in pipeline.rglob("*.json") if path.stat().st_size < 2**16))
    change_file(file, rng)
    from tests.campaign.hostile import loaded

    return Trial(file.relative_to(pipeline).as_posix(), loaded(pipeline))


def lora(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """A LoRA for the pipeline."""
    file = Path(shutil.copy(intact / "lora.safetensors", folder / "lora.safetensors"))
    change_safetensors(file, rng)
    from tests.campaign.hostile import loaded

    return Trial("LoRA", loaded(intact / "pipeline", [str(file)]))


def recipe(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """A built-in recipe."""
    import yaml

    from diffpress.compress.builtin import built_in_recipes

    source = rng.choice(sorted(built_in_recipes().values()))
    file, text = folder / "recipe.yaml", source.read_text().replace("../../../calib_data", "calib_data")
    if rng.random() < 0.4:
        file.write_bytes(changed_bytes(text.encode(), rng))
    else:
        value = changed_json(yaml.safe_load(text), rng)
        file.write_text(yaml.safe_dump(value, allow_unicode=True) if rng.random() < 0.5 else json.dumps(value))

    def action() -> int:
        from diffpress.compress.recipe import Recipe
        from diffpress.compress.recipe_text import read_recipe_text

        read, written = Recipe.load(file).to_json(), read_recipe_text(file)
        lost = [path for path in leaves(written) if not kept(path, read)]
        expect(not lost, f"ignored: {lost[:3]}")
        return 0

    return Trial(f"recipe {source.stem}", reported(action))


def arrays(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """An npz file of training data."""
    file = folder / "data.npz"
    file.write_bytes(changed_bytes((intact / "data.npz").read_bytes(), rng))

    def action() -> int:
        from diffpress.runtime.io.arrays import read_npz

        found = read_npz(file)
        intact_x = read_npz(intact / "data.npz")["x"]
        same = "x" in found and np.array_equal(found["x"], intact_x)  # the archive has a checksum of its content
        expect(same or "x" not in found, "changed values pass the checksum")
        return 0

    return Trial("npz", reported(action))


def picture(intact: Path, folder: Path, rng: random.Random) -> Trial:
    """A PNG to start from."""
    file = folder / "image.png"
    file.write_bytes(changed_bytes((intact / "grey.png").read_bytes(), rng))
    return Trial("PNG", command([*sample_words(intact / "bundle", "bundle"), "--image", file]))


# --- what the kinds share ----------------------------------------------------------------------------------------


def change_file(file: Path, rng: random.Random) -> None:
    """Change a JSON file by entries or by bytes, and any other file by bytes."""
    if file.suffix == ".safetensors":
        change_safetensors(file, rng)
    elif rng.random() < 0.7:
        file.write_text(json.dumps(changed_json(json.loads(file.read_text()), rng)))
    else:
        file.write_bytes(changed_bytes(file.read_bytes(), rng))


def change_safetensors(file: Path, rng: random.Random) -> None:
    """Change the header's entries, its bytes, or the whole file's bytes."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    action = rng.randrange(3)
    if action == 0:
        file.write_bytes(changed_bytes(data, rng))
        return
    header = data[8 : 8 + size]
    header = changed_bytes(header, rng) if action == 1 else json.dumps(changed_json(json.loads(header), rng)).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


def write_manifest(bundle: Path, content: Any) -> None:
    """Write a manifest with a hash that fits, whatever its type."""
    from diffpress.runtime.bundle import manifest_hash

    if isinstance(content, dict):
        content["hash"] = manifest_hash(content)
    (bundle / "manifest.json").write_text(json.dumps(content))


def seal_again(bundle: Path) -> None:
    """Let the manifest fit the changed files."""
    from diffpress.runtime.bundle import sha256

    content = json.loads((bundle / "manifest.json").read_text())
    for name in content["files"]:
        content["files"][name] = {"sha256": sha256(bundle / name), "bytes": (bundle / name).stat().st_size}
    write_manifest(bundle, content)


def sample_words(bundle: Path, name: str, engine: str = "onnxruntime") -> list[object]:
    """Return the command that samples one image of a copy of the bundle of this name."""
    prompt = ["--prompt", "a cat of a dog", "--steps", 1] if name == "text_bundle" else []
    return ["sample", bundle, "-n", 1, "--engine", engine, "--threads", 1, *prompt]


def command(words: list[object]) -> Action:
    from tests.campaign.forked import command as command_of

    return command_of(words)


def reported(action: Action) -> Action:
    """Return the action with its errors printed as the command line prints them."""
    from diffpress.cli.main import reported as run_reported

    return partial(run_reported, action, "read")


def samples(bundle: Path) -> np.ndarray:
    """Return samples of a bundle without prompts."""
    from diffpress.runtime.pipeline import Pipeline

    with Pipeline(bundle, "onnxruntime", threads=1) as pipeline:
        return np.concatenate(list(pipeline.images(SEEDS, pipeline.conditions(len(SEEDS)))))


def load_action(pipeline: Path) -> Action:
    """Return the action that loads a pipeline, and compares the denoiser's tensors with the bytes of its file."""
    from tests.campaign.hostile import loaded

    def compare() -> int:
        from diffpress.compress.sources.load import load_checkpoint

        state = load_checkpoint(pipeline).model.state_dict()
        for name, expected in stored_tensors(pipeline / WEIGHTS).items():
            tensor = state.get(name)
            expect(
                tensor is not None and np.array_equal(tensor.numpy().ravel(), expected, equal_nan=True),
                f"tensor {name} is not what the file holds",
            )
        return 0

    load = loaded(pipeline)
    return lambda: load() or reported(compare)()


def stored_tensors(file: Path) -> dict[str, np.ndarray]:
    """Return the float32 tensors of a safetensors file, flat."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    entries = {name: entry for name, entry in header.items() if name != "__metadata__" and entry["dtype"] == "F32"}
    return {name: np.frombuffer(body[slice(*entry["data_offsets"])], "<f4") for name, entry in entries.items()}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all keys of a recipe that hold a value."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in leaves(inner, (*path, key))]
    return [path] if path and value is not None and value not in ([], "") else []


def kept(path: tuple[Any, ...], recipe_json: dict[str, Any]) -> bool:
    """Return whether a key of the file is in the recipe that it became."""
    value: Any = recipe_json
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def expect(condition: object, problem: str) -> None:
    """Note a wrong load for the parent; the child ends normally."""
    if not condition:
        file = Path("wrong.json")
        known = json.loads(file.read_text()) if file.is_file() else []
        file.write_text(json.dumps([*known, problem]))


KINDS: dict[str, Callable[[Path, Path, random.Random], Trial]] = {
    "bundle": bundle_bytes,
    "manifest": manifest,
    "graph (bytes)": graph_bytes,
    "graph (messages)": graph_message,
    "tokenizer": tokenizer,
    "safetensors": safetensors,
    "checkpoint": checkpoint,
    "configs": configs,
    "LoRA": lora,
    "recipe": recipe,
    "npz": arrays,
    "PNG": picture,
}
