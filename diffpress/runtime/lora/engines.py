"""The engine of a denoiser without LoRAs, and the engine of its graph with slots, opened when they are needed.

no LoRA     denoiser.onnx: the branches of the slots are not computed
LoRAs       denoiser.lora.onnx: another LoRA or another scale changes its inputs, and nothing is opened or compiled
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import Engine, open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.lora.scales import DENOISER
from diffpress.runtime.lora.slots import Factors, fill_


class LoraEngines:
    """The two engines of a bundle's denoiser; one of them is open, or both with `keep_open`."""

    def __init__(self, bundle: Bundle, engine: str | None, options: EngineOptions, keep_open: bool) -> None:
        self._bundle, self._name, self._options, self._keep_open = bundle, engine, options, keep_open
        self._engines: dict[bool, Engine] = {}

    def with_loras(self, loras: Sequence[Mapping[str, Factors]]) -> Engine:
        """Return the open engine that computes with these LoRAs (layer -> factors); errors as in `open_engine`."""
        wanted = bool(loras)
        if wanted not in self._engines:
            opened = open_engine(self._bundle, self._name, options=self._options, lora=wanted)
            self._name = opened.name
            if not self._keep_open:
                self.close()
            self._engines[wanted] = opened
        engine = self._engines[wanted]
        if wanted:
            fill_slots_(self._bundle, engine, loras)
        return engine

    def close(self) -> None:
        """Release the engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


def fill_slots_(bundle: Bundle, engine: Any, loras: Sequence[Mapping[str, Factors]], graph: str = DENOISER) -> None:
    """Write LoRAs into the slots of an open graph, in place of those that are there."""
    entry = bundle.slots(graph, engine.name)
    assert entry is not None  # else the graph could not be opened
    fill_(engine.lora, int(entry["rank"]), loras)
