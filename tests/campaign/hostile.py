"""Campaign `hostile`: bundles, checkpoints and files that were made to do harm.

Each is opened by the verbs that would read it, in a forked child with limits. It survives if it is refused in one line
with exit code 2 (or loads correctly, where it is only strange), prints no control characters, and runs nothing.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import onnx

from tests.campaign.forked import Outcome, command, import_everything, run_forked
from tests.campaign.hostile_checkpoints import CANARY, CHECKPOINTS
from tests.campaign.hostile_files import ARRAYS, LORAS, PICTURES, PROMPTS, RECIPES
from tests.campaign.hostile_graphs import GRAPHS, SECRET
from tests.campaign.hostile_manifests import MANIFESTS, reseal
from tests.campaign.intact import make_intact
from tests.campaign.result import Result

Action = Callable[[], int]
Trial = tuple[str, Callable[[Path], list[tuple[str, Action]]], bool]
ENGINES = ("onnxruntime", "openvino")
INFO = "info"  # reads no weights, so that it does not see what is wrong with them


def run(minutes: float, seed: int) -> Result:
    """Try every hostile input with every verb that reads it, in an order that depends on the seed."""
    import_everything()
    result, end = Result(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="hostile-") as root:
        intact = make_intact(Path(root, "intact"))
        trials = list(all_trials(intact))
        random.Random(seed).shuffle(trials)
        for number, (name, prepare, must_refuse) in enumerate(trials):
            if time.monotonic() > end:
                result.notes.append(
                    f"{len(trials) - number} of {len(trials)} inputs were not tried in {minutes:g} minutes"
                )
                break
            folder = Path(root, "trial")
            folder.mkdir()
            for verb, action in prepare(folder):
                outcome = run_forked(action, folder)
                refusing = must_refuse and verb != INFO
                result.trial(f"{name}, {verb}", problems(outcome, refusing, folder))
            shutil.rmtree(folder)
    return result


def problems(outcome: Outcome, must_refuse: bool, folder: Path) -> Iterator[str]:
    """Yield what is wrong with the outcome of one hostile input."""
    yield from outcome.problems()
    if must_refuse and outcome.code == 0:
        yield "accepted"
    if any(folder.rglob(CANARY)):
        yield "its code was executed"


def all_trials(intact: Path) -> Iterator[Trial]:
    """Yield (name, what makes the input in a folder and returns the commands that read it, whether all must refuse)."""
    for name, (change_graph, must_refuse) in GRAPHS.items():
        yield name, partial(_graph, intact, change_graph), must_refuse
    for name, (change, must_refuse) in MANIFESTS.items():
        yield name, partial(_manifest, intact, change), must_refuse
    for name, (change, must_refuse) in CHECKPOINTS.items():
        yield name, partial(_checkpoint, intact, change), must_refuse
    tables = ((_recipe, RECIPES), (_array, ARRAYS), (_picture, PICTURES), (_prompts, PROMPTS), (_lora, LORAS))
    for prepare, writers in tables:
        for name, write in writers.items():
            yield name, partial(prepare, intact, write), True


def _graph(intact: Path, change: Callable[[onnx.ModelProto, Path], object], folder: Path) -> list[tuple[str, Action]]:
    from diffpress.runtime.bundle import sha256

    (folder / SECRET).write_bytes(bytes(range(256)) * 4096)
    bundle = Path(shutil.copytree(intact / "bundle", folder / "bundle"))
    file, manifest = bundle / "denoiser.onnx", json.loads((bundle / "manifest.json").read_text())
    model = onnx.load(file)
    extra = change(model, bundle)
    file.write_bytes(model.SerializeToString() + (extra if isinstance(extra, bytes) else b""))
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    reseal(bundle, manifest)
    return [(f"sample in {engine}", sample(bundle, engine)) for engine in ENGINES]


def _manifest(intact: Path, change: Callable[[Path], object], folder: Path) -> list[tuple[str, Action]]:
    bundle = Path(shutil.copytree(intact / "bundle", folder / "bundle", symlinks=True))
    change(bundle)
    return [
        (INFO, command(["info", bundle])),
        ("sample", sample(bundle, "onnxruntime")),
        ("serve", served(bundle)),
    ]


def _checkpoint(intact: Path, change: Callable[[Path], object], folder: Path) -> list[tuple[str, Action]]:
    pipeline = Path(shutil.copytree(intact / "pipeline", folder / "pipeline"))
    change(pipeline)
    return [(INFO, command(["info", pipeline])), ("load", loaded(pipeline))]


def _recipe(intact: Path, write: Callable[[Path], object], folder: Path) -> list[tuple[str, Action]]:
    write(folder / "recipe.yaml")
    words = [intact / "checkpoint", "--recipe", folder / "recipe.yaml"]
    return [("plan", command(["plan", *words])), ("compress", command(["compress", *words, "--out", folder / "out"]))]


def _array(intact: Path, write: Callable[[Path], object], folder: Path) -> list[tuple[str, Action]]:
    write(folder / "data.npz")
    recipe = folder / "recipe.yaml"
    recipe.write_text("data: data.npz\nstages: [{distill: {kind: recover, steps: 1}}]\n")
    words = ["compress", intact / "checkpoint", "--recipe", recipe, "--out", folder / "out"]
    return [("compress", command(words)), ("read", read_arrays(folder / "data.npz"))]


def _picture(intact: Path, write: Callable[[Path], object], folder: Path) -> list[tuple[str, Action]]:
    write(folder / "image.png")
    words = ["sample", intact / "bundle", "--engine", "onnxruntime", "--image", folder / "image.png"]
    return [("sample --image", command(words)), ("sample --mask", command([*words, "--mask", folder / "image.png"]))]


def _prompts(intact: Path, write: Callable[[Path], object], folder: Path) -> list[tuple[str, Action]]:
    write(folder / "prompts.txt")
    words = ["sample", intact / "text_bundle", "--engine", "onnxruntime", "--prompt-file", folder / "prompts.txt"]
    return [("sample --prompt-file", command(words))]


def _lora(intact: Path, write: Callable[[Path], object], folder: Path) -> list[tuple[str, Action]]:
    write(folder / "lora.safetensors")
    return [("load --lora", loaded(intact / "pipeline", [str(folder / "lora.safetensors")]))]


def sample(bundle: Path, engine: str) -> Action:
    """Return the action that samples one image of a bundle without prompts."""
    return command(["sample", bundle, "-n", 1, "--engine", engine, "--threads", 1])


def served(bundle: Path) -> Action:
    """Return the action that opens a bundle as `serve` does, and closes it."""

    def action() -> int:
        from diffpress.cli.main import reported
        from diffpress.runtime.engines.options import EngineOptions
        from diffpress.serve.models import Model, Source

        def opened() -> int:
            Model(Source(bundle, None, "onnxruntime"), EngineOptions(threads=1), 1).open().close()
            return 0

        return reported(opened, "serve")

    return action


def loaded(folder: Path, loras: list[str] | None = None) -> Action:
    """Return the action that loads a checkpoint with all its components and tokenizers, as `export` does."""

    def action() -> int:
        from diffpress.cli.main import reported
        from diffpress.compress.models.components import component_names, load_component
        from diffpress.compress.sources.layout import read_layout
        from diffpress.compress.sources.load import load_checkpoint

        def load() -> int:
            checkpoint = load_checkpoint(folder, loras=loras or ())
            for name in component_names(checkpoint):
                load_component(checkpoint, name)
            layout = read_layout(folder)
            for _, tokenizer in layout.encoders:
                layout.tokenizer(tokenizer)
            return 0

        return reported(load, "load")

    return action


def read_arrays(file: Path) -> Action:
    """Return the action that reads an npz file."""

    def action() -> int:
        from diffpress.cli.main import reported
        from diffpress.runtime.io.arrays import read_npz

        return reported(lambda: int(read_npz(file) is None), "read")

    return action
