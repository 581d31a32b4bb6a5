"""Options of inference engines; each backend lists those it supports in its OPTIONS."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.errors import InvalidInputError, unknown_name

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16")
FORMER_PRECISIONS = {"f32": "fp32", "f16": "fp16"}


@dataclass(frozen=True)
class EngineOptions:
    """Options of an inference engine.

    Attributes:
        threads: CPU threads; None lets the engine choose.
        precision: Compute type of the float parts of a graph, if the CPU supports it.
        streams: Number of batches run concurrently, each on its share of the threads.
        cache: Cache of compiled models, or None.
        providers: ONNX Runtime execution providers to try in order; empty lets the engine choose.
        lean: Keep large weights memory-mapped instead of prepacking a second, faster copy.
        rebuild: Build a TensorRT engine from the graph if no existing one fits this machine.
    """

    threads: int | None = None
    precision: str = "fp32"
    streams: int = 1
    cache: Cache | None = None
    providers: tuple[str, ...] = ()
    lean: bool = False
    rebuild: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InvalidInputError(f"{self.threads} threads: must be at least 1; omit it to let the engine choose")
        if self.streams < 1:
            raise InvalidInputError(f"{self.streams} streams: must be at least 1")
        if self.precision in FORMER_PRECISIONS:
            present = FORMER_PRECISIONS[self.precision]
            logger.warning(f"precision {self.precision} is now {present}; the old name works until diffpress 0.4")
            object.__setattr__(self, "precision", present)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)

    def with_threads(self, threads: int | None) -> EngineOptions:
        """Return a copy with this number of threads; None returns the options unchanged."""
        return self if threads is None else replace(self, threads=threads)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values for another process; a cache is written as its folder."""
        cache = None if self.cache is None else str(self.cache.folder)
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"cache": cache}

    @staticmethod
    def from_json(data: dict[str, Any]) -> EngineOptions:
        """Read options written by `to_json`."""
        cache = Cache(Path(data["cache"])) if data.get("cache") else None
        return EngineOptions(**data | {"providers": tuple(data.get("providers", ())), "cache": cache})

    @property
    def non_default(self) -> list[str]:
        """Names of the options that differ from their default; `cache` is excluded, since an engine may ignore it."""
        return [f.name for f in fields(self) if f.name != "cache" and getattr(self, f.name) != f.default]


def check_options(engine: str, options: EngineOptions, known: Collection[str]) -> None:
    """Raise InvalidInputError if a non-default option is not in `known`, the options the engine supports."""
    for name in options.non_default:
        if name not in known:
            raise InvalidInputError(f"engine '{engine}' has no option '{name}': omit it or use another engine")
