"""Bundles that the server offers: verified when it starts, opened when they are needed, closed to keep a memory budget.

The size of a model is that of its graphs, without the activations that an engine adds. A model has one thread, which
opens its pipeline and runs it: a pipeline runs one batch at a time, or as many as its engine has streams.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from diffpress.runtime.bundle import MANIFEST, Bundle, load_bundle
from diffpress.runtime.engines import ENGINES
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.outputs import output_shape
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.prompts import open_tokenizer, tokenize
from diffpress.runtime.sampler import warm_up
from diffpress.serve.errors import RequestError
from diffpress.serve.requests.plans import planned

logger = logging.getLogger(__name__)

DEFAULT = "default"
KEPT_PLANS = 256


class Source(NamedTuple):
    """A model as the command line names it: [NAME=]PATH[@ENGINE]."""

    path: Path
    name: str | None = None
    engine: str | None = None


def parsed_source(text: str) -> Source:
    """Parse [NAME=]PATH[@ENGINE]; what follows the @ is a part of the path if it names no engine."""
    name, equals, rest = text.partition("=")
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
        InvalidInputError: It is no bundle.
        MissingDependencyError: It is conditioned on text, and `tokenizers` is not installed.
    """

    def __init__(self, source: Source, options: EngineOptions, batch: int) -> None:
        self.bundle: Bundle = load_bundle(source.path)
        self.name = source.name or _folder_name(self.bundle.path)
        self.engine, self.options, self.batch = source.engine, options, batch
        self.created = int((self.bundle.path / MANIFEST).stat().st_mtime)
        self.graph_bytes = sum(
            _graph_bytes(self.bundle, graph, source.engine) for graph in self.bundle.manifest["graphs"]
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
        pipeline = Pipeline(self.bundle, self.engine, options=self.options)
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


class ModelStore:
    """The models by name, and which of them are open.

    Args:
        models: At least one; the first is the default.
        budget_bytes: Size of the open models together; None for no limit.

    Raises:
        InvalidInputError: Two models have one name, or one alone is larger than the budget.
    """

    def __init__(self, models: Sequence[Model], budget_bytes: int | None = None) -> None:
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models) or DEFAULT in self.models:
            names = ", ".join(model.name for model in models)
            raise InvalidInputError(
                f"models {names}: each needs a name of its own, and not '{DEFAULT}'; name a bundle with NAME=PATH"
            )
        for model in models:
            if budget_bytes is not None and model.graph_bytes > budget_bytes:
                raise InvalidInputError(
                    f"{model.bundle.path}: its graphs have {model.graph_bytes / 2**20:.1f} MiB, more than the memory "
                    f"budget of {budget_bytes / 2**20:.1f} MiB"
                )
        self._budget = budget_bytes
        self._turn, self._opening, self._freed = asyncio.Lock(), asyncio.Lock(), asyncio.Event()

    def named(self, name: str | None) -> Model:
        """Return a model; the first one for None and 'default'. Raises RequestError (404) for an unknown name."""
        if name is None or name == DEFAULT:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise RequestError(404, "model_not_found", str(unknown_name("model", name, (*self.models, DEFAULT))))
        return self.models[name]

    @property
    def open_models(self) -> list[Model]:
        """Models that are open or being opened."""
        return [model for model in self.models.values() if model.pipeline is not None or model.users]

    @property
    def _open_bytes(self) -> int:
        return sum(model.graph_bytes for model in self.open_models)

    @asynccontextmanager
    async def using(self, model: Model) -> AsyncIterator[Pipeline]:
        """Keep a model open, after closing others that the budget has no room for, the least recently used first.

        Raises:
            InvalidInputError: It cannot be opened.
        """
        async with self._turn:  # in the order of arrival, so that a busy model cannot keep another one out
            if model.pipeline is None and not model.users:
                await self._make_room(model)
            model.users += 1
        try:
            model.last_used = time.monotonic()
            yield await self._opened(model)
        finally:
            model.users -= 1
            self._freed.set()

    async def _opened(self, model: Model) -> Pipeline:
        if model.pipeline is not None:
            return model.pipeline
        async with self._opening:  # one at a time, since several would compile on the same processors
            if model.pipeline is None:
                started = time.monotonic()
                model.pipeline = await _in_thread(model, model.open)
                logger.info(
                    f"opened {model.name} in {model.pipeline.denoiser.name}, {time.monotonic() - started:.1f} s"
                )
            return model.pipeline

    async def _make_room(self, model: Model) -> None:
        """Close models until `model` fits; wait for those that are in use."""
        while self._budget is not None and self._open_bytes + model.graph_bytes > self._budget:
            idle = [other for other in self.open_models if not other.users]
            if idle:
                await self._close(min(idle, key=lambda other: other.last_used))
                continue
            self._freed.clear()
            await self._freed.wait()

    async def _close(self, model: Model) -> None:
        pipeline, model.pipeline = model.pipeline, None
        if pipeline is not None:
            await _in_thread(model, pipeline.close)
            logger.info(f"closed {model.name}")

    async def close(self) -> None:
        """Close all models."""
        for model in self.models.values():
            await self._close(model)
            model.thread.shutdown()


def _folder_name(path: Path) -> str:
    """Return the name of the bundle's folder, or of the compress run's around a folder that is called 'bundle'."""
    folder = path.resolve()
    return folder.parent.name if folder.name == "bundle" else folder.name


def _graph_bytes(bundle: Bundle, graph: str, engine: str | None) -> int:
    """Return the size of a graph with its weights, in the variant for this engine."""
    entry = bundle.manifest["graphs"][graph]
    entry = entry.get("variants", {}).get(engine, entry)
    return int(entry.get("bytes") or bundle.manifest["files"][entry["file"]]["bytes"])


async def _in_thread(model: Model, run: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(model.thread, run)
