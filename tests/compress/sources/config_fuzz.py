"""Fuzz of a pipeline's configs: change one entry, sample with diffusers and with diffpress, compare the images.

    python -m tests.compress.sources.config_fuzz sd --changes 200 --seed 0 [--component scheduler] [--verbose]

A change is one entry of one component's config, present in the file or in the signature of its class, with a value that
diffusers accepts: it builds the component, and its pipeline samples a finite image that is not constant. Components
with weights are rebuilt from the changed config. Outcomes:

    same         PSNR of at least SAME_DB to diffusers from the same noise
    limit        float32 is the limit: the images of diffusers itself move as far if its noise moves by one rounding
    refused      InvalidInputError that names the entry
    wrong        another image, another exception, or a refusal that does not name the entry
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import json
import logging
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, PixArtSigmaPipeline, UNet2DModel

from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_size import resized
from diffpress.runtime.sampler import noise_for
from tests.against_diffusers import LABELS, PROMPTS, SEEDS, psnr_db, sampled_in_torch, with_short_plan
from tests.compress.sources.config_values import values_for
from tests.pipelines import KINDS, _pixart, fill_zeros_, pixart, sampled, tiny_pipeline, vae

SAME_DB = 90.0
LIMIT_MARGIN_DB = 10.0
STEPS = 3
FLUX_SIDE = 8  # latent cells; the config has no size, and the default is 128
LARGEST_SIDE = 24
LENGTHS = {"StableDiffusion3Pipeline": 256, "FluxPipeline": 512, "PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
CONFIG_FILES = ("config.json", "scheduler_config.json", "tokenizer_config.json")
TOKENIZER_ENTRIES = ("model_max_length", "padding_side", "truncation_side", "pad_token")
UNRELATED = ("transformers_version", "architectures", "id2label", "label2id", "problem_type", "dtype", "is_decoder")
INDEX = "model_index"


def _ddim() -> DDIMPipeline:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 8}
    model = UNet2DModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, **blocks)
    return DDIMPipeline(model, DDIMScheduler())


# the published sizes of the last two are too slow for hundreds of images
SMALL: dict[str, Callable[[], Any]] = {
    "ddim": _ddim,
    "pixart-sigma": lambda: _pixart(
        PixArtSigmaPipeline, pixart(use_additional_conditions=False, interpolation_scale=2), vae(scaling_factor=0.13025)
    ),
}
FUZZED = {**{kind: build for kind, build in KINDS.items() if kind != "pixart-alpha-1024"}, **SMALL}


@dataclass(frozen=True)
class Change:
    """One entry of one component's config set to another value."""

    component: str
    entry: str
    value: Any

    def __str__(self) -> str:
        return f"{self.component}: {self.entry} = {json.dumps(self.value)[:80]}"


@dataclass(frozen=True)
class Result:
    """The outcome of a change that diffusers accepts: same, limit, refused or wrong, and a detail for people."""

    change: Change
    outcome: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.outcome:8}{self.change}   {self.detail}"


class NotAcceptedError(Exception):
    """diffusers does not sample a usable image with this value."""


def config_file(folder: Path, component: str) -> Path:
    """Return the file that holds the config of a component, or model_index.json."""
    if component == INDEX:
        return folder / "model_index.json"
    return next(folder / component / name for name in CONFIG_FILES if (folder / component / name).is_file())


def changes_of(folder: Path) -> list[Change]:
    """Return every change that the fuzz knows for a pipeline folder."""
    found = []
    for component in (*sorted(path.name for path in folder.iterdir() if path.is_dir()), INDEX):
        config = json.loads(config_file(folder, component).read_text())
        entries = _entries(folder, component, config)
        found += [
            Change(component, entry, value) for entry in sorted(entries) for value in values_for(entry, entries[entry])
        ]
    return found


def _entries(folder: Path, component: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config with their values, the class's default where the file does not have them."""
    if component.startswith("tokenizer"):
        return {name: config.get(name) for name in TOKENIZER_ENTRIES}
    own = class_defaults(folder, component)
    if component == "scheduler":
        own["_class_name"] = config["_class_name"]
    return {**own, **{key: value for key, value in config.items() if key in own}}


def class_defaults(folder: Path, component: str) -> dict[str, Any]:
    """Return the entries that the class of a component, or of the pipeline, has a default for."""
    index = json.loads((folder / "model_index.json").read_text())
    library, name = ("diffusers", index["_class_name"]) if component == INDEX else index[component]
    cls = getattr(diffusers if library == "diffusers" else transformers, name)
    if library == "transformers":
        cls = cls.config_class
    parameters = inspect.signature(cls.__init__).parameters.items()
    found = {key: argument.default for key, argument in parameters if argument.default is not argument.empty}
    return {key: value for key, value in found.items() if key not in UNRELATED and not callable(value)}


def in_order(changes: Sequence[Change], seed: int) -> list[Change]:
    """Shuffle changes so that every component, and every entry of it, has the same chance to come early."""
    draw = random.Random(seed)
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        groups.setdefault((change.component, change.entry), []).append(change)
    components: dict[str, list[list[Change]]] = {}
    for (component, _), group in groups.items():
        draw.shuffle(group)
        components.setdefault(component, []).append(group)
    queues = []
    for entries in components.values():
        draw.shuffle(entries)
        rounds = itertools.zip_longest(*entries)
        queues.append([change for turn in rounds for change in turn if change is not None])
    return [change for turn in itertools.zip_longest(*queues) for change in turn if change is not None]


def apply_(folder: Path, component: str, entries: dict[str, Any], seed: int = 1) -> None:
    """Change a component's config in place; one with weights is rebuilt with seeded random ones.

    Raises:
        NotAcceptedError: The class cannot be built with these values.
    """
    file = config_file(folder, component)
    config = {**json.loads(file.read_text()), **entries}
    if file.name != "config.json":
        file.write_text(json.dumps(config))
        if component == "scheduler" and "_class_name" in entries:  # diffusers builds the class that the index names
            index = json.loads((folder / "model_index.json").read_text())
            index["scheduler"] = ["diffusers", entries["_class_name"]]
            (folder / "model_index.json").write_text(json.dumps(index))
        return
    library, name = json.loads((folder / "model_index.json").read_text())[component]
    with torch.random.fork_rng(devices=[]), _accepted():
        torch.manual_seed(seed)
        if library == "diffusers":
            module: Any = getattr(diffusers, name).from_config(config)
        else:
            cls = getattr(transformers, name)
            module = cls(cls.config_class.from_dict(config))
        fill_zeros_(module)
        module.save_pretrained(folder / component)
    # a class may drop an entry that it does not know
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@contextlib.contextmanager
def _accepted() -> Iterator[None]:
    """Turn every exception of diffusers and transformers into NotAcceptedError, and ignore their advice."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # any type: they check little of what a config holds
        raise NotAcceptedError(f"{type(error).__name__}: {error}") from error


def sampled_as_published(folder: Path, scale: float = 1.0) -> np.ndarray:
    """Sample with diffusers in the size and with the guidance that its pipeline takes by default.

    Raises:
        NotAcceptedError: It raises, or the image is constant or not finite.
    """
    with _accepted():
        pipe: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
        noise = torch.from_numpy(noise_for(SEEDS, _latent_shape(pipe, model))) * scale
        kind = type(pipe).__name__
        options = {"max_sequence_length": LENGTHS[kind]} if kind in LENGTHS else {}
        with fixed_step_noise(tuple(noise.shape[1:])):
            images = np.asarray(sampled(pipe, noise, PROMPTS, LABELS, steps=STEPS, **options))
    if not np.isfinite(images).all() or images.std() <= 0.02:
        raise NotAcceptedError("the image is constant or not finite")
    return images


@contextlib.contextmanager
def fixed_step_noise(shape: tuple[int, ...]) -> Iterator[None]:
    """Give the schedulers of diffusers the noise that diffpress draws for SEEDS at each step."""
    streams = itertools.count(1)

    def stream(*_: Any, **__: Any) -> torch.Tensor:
        return torch.from_numpy(noise_for(SEEDS, shape, stream=next(streams)))

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.schedulers.scheduling_") and hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", stream))
        yield


def _latent_shape(pipe: Any, model: Any) -> tuple[int, int, int]:
    if type(pipe).__name__ == "FluxPipeline":
        return model.config.in_channels // 4, FLUX_SIDE, FLUX_SIDE
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if max(height, width) > LARGEST_SIDE:
        raise NotAcceptedError(f"{height} x {width} latents are too slow to compare")
    return model.config.in_channels, height, width


def sampled_by_diffpress(folder: Path) -> np.ndarray:
    """Sample with the runtime's sampler and torch networks, in the checkpoint's own size and guidance."""
    checkpoint = with_short_plan(load_checkpoint(folder), STEPS)
    spec = checkpoint.spec
    if checkpoint.source.kind == "FluxTransformer2DModel":
        checkpoint = checkpoint.evolve(spec=resized(spec, (FLUX_SIDE * spec.latent_factor,) * 2))
    return sampled_in_torch(checkpoint)


def outcome(folder: Path, change: Change) -> Result:
    """Apply a change to a pipeline folder and compare.

    Raises:
        NotAcceptedError: diffusers does not accept the value.
    """
    apply_(folder, change.component, {change.entry: change.value})
    theirs = sampled_as_published(folder)
    try:
        ours = sampled_by_diffpress(folder)
    except InvalidInputError as error:
        text = str(error)
        named = change.entry in text or (change.entry == "_class_name" and str(change.value) in text)
        return Result(change, "refused" if named else "wrong", text)
    except Exception as error:  # whatever a user would see as a traceback
        return Result(change, "wrong", f"{type(error).__name__}: {error}")
    if ours.shape != theirs.shape:
        return Result(change, "wrong", f"shape {ours.shape} against {theirs.shape}")
    found = psnr_db(ours, theirs)
    if found >= SAME_DB:
        return Result(change, "same", f"{found:.0f} dB")
    own = psnr_db(sampled_as_published(folder, 1 + 2.0**-23), theirs)
    limited = own < SAME_DB + LIMIT_MARGIN_DB and found > own - 2 * LIMIT_MARGIN_DB
    return Result(change, "limit" if limited else "wrong", f"{found:.0f} dB; diffusers to itself {own:.0f} dB")


def fuzz(
    kind: str,
    work: Path,
    count: int,
    seed: int = 0,
    component: str = "",
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Return the results of the first `count` accepted changes, in the order of `seed`.

    Args:
        kind: One of FUZZED.
        work: Folder for the pipelines.
        count: Number of accepted changes; fewer if the kind has no more.
        seed: Seed of the order.
        component: Change only this component, such as "scheduler"; "-scheduler" for all but this one.
        on_result: Called after each comparison.
    """
    base = tiny_pipeline(FUZZED[kind], work / "base")
    results: list[Result] = []
    changes = [one for one in changes_of(base) if not component or _is_chosen(one.component, component)]
    for change in in_order(changes, seed):
        if len(results) == count:
            break
        folder = work / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        with contextlib.suppress(NotAcceptedError):
            results.append(outcome(folder, change))
            on_result(results[-1])
    return results


def _is_chosen(component: str, chosen: str) -> bool:
    return component != chosen[1:] if chosen.startswith("-") else component == chosen


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence what diffusers and transformers say about odd configs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main() -> int:
    parser = argparse.ArgumentParser(description="change single config entries and compare with diffusers")
    parser.add_argument("kind", choices=FUZZED)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--component", default="", help="this component alone; =-NAME for all others")
    parser.add_argument("--verbose", action="store_true", help="print every result, not only the wrong ones")
    args = parser.parse_args()

    def show(result: Result) -> None:
        if args.verbose or result.outcome == "wrong":
            print(result, flush=True)  # noqa: T201

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work, quietly():
        results = fuzz(args.kind, Path(work), args.changes, args.seed, args.component, show)
    counts = Counter(result.outcome for result in results)
    summary = ", ".join(f"{number} {name}" for name, number in counts.most_common())
    print(f"{args.kind}: {len(results)} changes; {summary}")  # noqa: T201
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
