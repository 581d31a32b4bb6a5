"""A complete engine in one module, as the guide shows it: onnx's reference evaluator. Slow, and right by definition."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from diffpress.runtime.bundle import PrebuiltEngine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError

EXTRA = "compress"  # the extra that installs the package
OPTIONS: set[str] = set()  # fields of EngineOptions that the engine supports


def missing() -> str | None:
    """Return the package to install, or None if it is installed."""
    return None if importlib.util.find_spec("onnx") else "onnx"


def unusable() -> None:
    """Return why this machine cannot run the installed package: never."""


def load(path: Path, options: EngineOptions, built: Sequence[PrebuiltEngine] = ()) -> ReferenceEngine:
    """Load an ONNX file."""
    return ReferenceEngine(path)


class ReferenceEngine:
    """See diffpress.runtime.engines.Engine."""

    name, device = "reference", "cpu"

    def __init__(self, path: Path) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        try:
            graph = onnx.load(path)
            self._evaluator: Any = ReferenceEvaluator(graph)
        except Exception as error:  # onnx's errors share no base class
            raise InvalidInputError(f"{path}: onnx cannot load it ({error}); export it again") from error
        kinds = {node.name: node.type.tensor_type.elem_type for node in graph.graph.input}
        self.inputs = {name: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)) for name, kind in kinds.items()}

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the first output."""
        return next(iter(self.run_all(inputs).values()))

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return all outputs by name."""
        return dict(zip(self._evaluator.output_names, self._evaluator.run(None, inputs), strict=True))

    def precision_report(self, example_inputs: object, quantized_layers: object = ()) -> NoReturn:
        """Refuse: this engine cannot tell what runs on integers."""
        raise EngineUnavailableError("engine 'reference' does not report precision; use another engine")

    kernel_times = precision_report

    def integer_mac_share(self, example_inputs: object) -> None:
        """Return None: unknown."""

    def close(self) -> None:
        """Release the graph."""
        self._evaluator = None
