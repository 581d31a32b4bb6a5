"""What a user may ask of an engine, as one small value; each backend names those that it knows in its OPTIONS."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.errors import InvalidInputError, unknown_name

PRECISIONS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class EngineOptions:
    """threads    processor threads, None leaves the number to the engine
    precision  what the float parts of a graph may be computed in, where the processor has it
    streams    how many batches it runs at the same time, each on its share of the threads
    cache      where what took long to compile is kept, None for nowhere
    providers  ONNX Runtime's execution providers, the first that works is taken; none leaves them to the engine
    lean       leave large weights in their mapped file, instead of packing a second copy that runs faster
    rebuild    build a TensorRT plan from the graph where none that is there fits this machine
    """

    threads: int | None = None
    precision: str = "f32"
    streams: int = 1
    cache: Cache | None = None
    providers: tuple[str, ...] = ()
    lean: bool = False
    rebuild: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InvalidInputError(f"{self.threads} threads: at least 1, or leave it out to let the engine choose")
        if self.streams < 1:
            raise InvalidInputError(f"{self.streams} streams: at least 1")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)

    def with_threads(self, threads: int | None) -> EngineOptions:
        """These options on so many threads; None leaves them as they are."""
        return self if threads is None else replace(self, threads=threads)

    def to_json(self) -> dict[str, Any]:
        """For another process; a cache goes as its folder."""
        cache = None if self.cache is None else str(self.cache.folder)
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"cache": cache}

    @staticmethod
    def from_json(data: dict[str, Any]) -> EngineOptions:
        cache = Cache(Path(data["cache"])) if data.get("cache") else None
        return EngineOptions(**data | {"providers": tuple(data.get("providers", ())), "cache": cache})

    @property
    def asked(self) -> list[str]:
        """The names of those that were asked for; a cache is an offer that no engine has to take."""
        return [f.name for f in fields(self) if f.name != "cache" and getattr(self, f.name) != f.default]


def check_options(engine: str, options: EngineOptions, known: Collection[str]) -> None:
    """InvalidInputError for an option that was asked for and that the engine does not know."""
    for name in options.asked:
        if name not in known:
            raise InvalidInputError(f"engine '{engine}' has no option '{name}': leave it out, or take another engine")
