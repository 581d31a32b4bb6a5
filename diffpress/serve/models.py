"""Bundles that the server offers: verified when it starts, opened when they are needed.

The size of a model is that of its graphs, without the activations that an engine adds. A model has one thread, which
opens its pipeline and runs it: a pipeline runs one batch at a time, or as many as its engine has streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from diffpress.runtime.bundle import MANIFEST, Bundle, load_bundle
from diffpress.runtime.engines import ENGINES
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.encode import ENCODER
from diffpress.runtime.outputs import output_shape
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.prompts import open_tokenizer, tokenize
from diffpress.runtime.sampler import warm_up
from diffpress.serve.requests.plans import planned

DEFAULT = "default"
KEPT_PLANS = 256


class Source(NamedTuple):
    """A model as the command line names it: [NAME=]PATH[@ENGINE]."""

    path: Path
    name: str | None = None
    engine: str | None = None


def parsed_source(text: str) -> Source:
    """Parse [NAME=]PATH[@ENGINE]; what follows the @ is a part of the path if it names no engine."""
    name, equals, rest = ("", "", text) if Path(text).exists() else text.partition("=")
    if not equals:
        name, rest = "", text
    path, at, engine = rest.rpartition("@")
    if not at or engine not in ENGINES:
        path, engine = rest, ""
    if not path or (equals and not name) or name == DEFAULT:
        raise InvalidInputError(
            f"{text}: give a bundle as PATH, NAME=PATH or NAME=PATH@ENGINE; NAME is not '{DEFAULT}'"
        )
    return Source(Path(path), name or None, engine or None)


class Model:
    """A bundle with its engine, open or not.

    Args:
        source: Where it is, and what it is called.
        options: Options of its engine.
        batch: Images that are sampled together at most.
        public_key: PEM file of the key that the bundle has to be signed with, if any.

    Attributes:
        name: Its name in requests.
        bundle: The verified bundle.
        created: When its manifest was written, in seconds since 1970.
        graph_bytes: Size of its graphs.
        pipeline: The open bundle, or None.
        thread: The only thread that uses the pipeline.
        users: Batches that need it open.
        last_used: When the last of them started, in seconds of the monotonic clock.

    Raises:
        InvalidInputError: It is no bundle, or not signed with the key.
        MissingDependencyError: It is conditioned on text, and `tokenizers` is not installed.
    """

    def __init__(self, source: Source, options: EngineOptions, batch: int, public_key: Path | None = None) -> None:
        self.bundle: Bundle = load_bundle(source.path, public_key)
        self.name = source.name or _folder_name(self.bundle.path)
        self.engine, self.options, self.batch = source.engine, options, batch
        self.created = int((self.bundle.path / MANIFEST).stat().st_mtime)
        self.graph_bytes = sum(
            _graph_bytes(self.bundle, graph, source.engine)
            for graph in self.bundle.manifest["graphs"]
            if graph != ENCODER  # a server takes no images to start from
        )
        self.planned = lru_cache(KEPT_PLANS)(partial(planned, self.bundle))
        encoders = self.bundle.spec.conditioning.encoders
        self._tokenizers = [
            (encoder, open_tokenizer(self.bundle.path / encoder.tokenizer / "tokenizer.json")) for encoder in encoders
        ]
        self._tokenizing = Lock()  # a tokenizer's truncation is set before it is used
        self.pipeline: Pipeline | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self.users, self.last_used = 0, 0.0

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        """Return one warning for every prompt and encoder that reads only a part of it."""
        with self._tokenizing:
            parts = [
                (encoder, unread)
                for encoder, tokenizer in self._tokenizers
                for unread in tokenize(tokenizer, list(dict.fromkeys(prompts)), encoder).unread
                if unread
            ]
        return [
            f"prompt: {encoder.graph} reads {encoder.length} tokens and left out '{part}'" for encoder, part in parts
        ]

    def open(self) -> Pipeline:
        """Open the pipeline and compile it for every batch size; called in the model's thread.

        Raises:
            InvalidInputError: As in `Pipeline`.
        """
        pipeline = Pipeline(self.bundle, self.engine, options=self.options, keep_open=True)
        spec = pipeline.spec
        try:
            for size in batch_sizes(self.batch):
                warm_up(pipeline.denoiser, spec, size)
            if spec.conditioning.encoders:
                pipeline.conditions(1, spec, prompts=[""])
            pipeline.decode(np.zeros((1, *spec.sample_shape), np.float32))
        except BaseException:
            pipeline.close()
            raise
        return pipeline

    def to_json(self) -> dict[str, Any]:
        """Return the model as GET /v1/models shows it."""
        spec = self.bundle.spec
        conditioning, plan = spec.conditioning, spec.plan
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "diffpress",
            "loaded": self.pipeline is not None,
            "engine": self.engine if self.pipeline is None else self.pipeline.denoiser.name,
            "conditioning": conditioning.kind,
            "classes": conditioning.classes,
            "output_shape": list(output_shape(self.bundle)),
            "plan": {"solver": plan.solver, "steps": plan.steps, "guidance": plan.guidance},
            "hash": self.bundle.hash,
        }


def batch_sizes(most: int) -> tuple[int, ...]:
    """Return the sizes of batches, ascending: 1, 2, 4, ... and `most`; engines compile for each of them."""
    sizes = {most}
    size = 1
    while size < most:
        sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))


def _folder_name(path: Path) -> str:
    """Return the name of the bundle's folder, or of the compress run's around a folder that is called 'bundle'."""
    folder = path.resolve()
    return folder.parent.name if folder.name == "bundle" else folder.name


def _graph_bytes(bundle: Bundle, graph: str, engine: str | None) -> int:
    """Return the size of a graph with its weights, in the variant for this engine."""
    entry = bundle.manifest["graphs"][graph]
    entry = entry.get("variants", {}).get(engine, entry)
    size = int(entry.get("bytes") or bundle.manifest["files"][entry["file"]]["bytes"])
    return 2 * size if "cached" in entry else size  # the cached graph has a copy of its weights in memory
