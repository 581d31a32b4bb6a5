"""A bundle's text encoders and tokenizers, opened when they are needed.

A text encoder that is larger than the denoiser, and not small, is closed directly after use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from threading import Lock

import numpy as np

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import Engine
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.prompts import open_tokenizer

SMALL_BYTES = 64 * 2**20  # an engine of that size opens in tenths of a second, and is no burden in memory


class TextEncoders:
    """A bundle's text encoders and tokenizers by name, opened when they are needed."""

    def __init__(self, bundle: Bundle, open_graph: Callable[[str], Engine], keep_open: bool = False) -> None:
        """Read the tokenizers; `keep_open` closes no encoder after use."""
        encoders = bundle.spec.conditioning.encoders
        if not encoders:
            raise InvalidInputError(
                f"{bundle.path}: the model is conditioned on text and its bundle has no text encoder; "
                "export the whole pipeline's folder, not its denoiser alone"
            )
        self.tokenizers = {e.tokenizer: open_tokenizer(bundle.path / e.tokenizer / "tokenizer.json") for e in encoders}
        self.encoders = {e.graph: _OnDemand(bundle, open_graph, e.graph, keep_open) for e in encoders}

    def close_unless(self, is_current: Callable[[str, Engine], bool]) -> None:
        """Close the open engines for which `is_current`(graph, engine) is False; they are opened again when needed."""
        for graph, encoder in self.encoders.items():
            encoder.close_unless(partial(is_current, graph))

    def close(self) -> None:
        """Release the engines."""
        for encoder in self.encoders.values():
            encoder.close()


class _OnDemand:
    """A network that is opened for its first run; one larger than the denoiser and SMALL_BYTES is closed after each."""

    def __init__(self, bundle: Bundle, open_graph: Callable[[str], Engine], graph: str, keep_open: bool) -> None:
        self._open = partial(open_graph, graph)
        self._engine: Engine | None = None
        self._opening = Lock()  # threads may share a pipeline
        graphs = bundle.manifest["graphs"]
        self.inputs: Mapping[str, np.dtype] = {
            name: np.dtype(entry["dtype"]) for name, entry in graphs[graph]["inputs"].items()
        }
        self._stays_open = keep_open or graphs[graph]["bytes"] <= max(graphs["denoiser"]["bytes"], SMALL_BYTES)

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not self._stays_open:
            with closing(self._open()) as engine:
                return engine.run_all(inputs)
        with self._opening:
            if self._engine is None:
                self._engine = self._open()
            engine = self._engine
        return engine.run_all(inputs)

    def close_unless(self, is_current: Callable[[Engine], bool]) -> None:
        if self._engine is not None and not is_current(self._engine):
            self.close()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
