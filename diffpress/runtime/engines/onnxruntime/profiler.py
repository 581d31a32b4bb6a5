"""Profiler of an ONNX Runtime session: its kernels from the JSON file that the session writes.

Weights that a session prepacks are missing from the shapes in its file, so shapes are those of one run of a session
that neither prepacks nor blocks convolutions; kernels that only the timed session has show their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from diffpress.runtime.engines.executed_layers import ExecutedLayer
from diffpress.runtime.engines.onnxruntime.kernels import (
    Event,
    kernel_bytes,
    kernel_macs,
    kernel_name,
    kernel_operation,
    kernel_precision,
)
from diffpress.runtime.engines.precision_report import CALL
from diffpress.runtime.io.onnx_wire import Node

ACTIVATIONS = ("Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh")  # that ONNX Runtime fuses


class Recorder:
    """A session that records its kernels.

    Args:
        open_session: Returns a session with the options that it takes.
        options: The SessionOptions; profiling is switched on in them.
    """

    def __init__(self, open_session: Callable[[Any], Any], options: Any) -> None:
        self._folder = TemporaryDirectory()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._session = open_session(options)

    def run(self, inputs: dict[str, np.ndarray]) -> None:
        """Evaluate the graph once."""
        self._session.run(None, inputs)

    def events(self) -> list[Event]:
        """Return the kernel events of all runs, in the order of execution, and close the session."""
        with self._folder:
            found = json.loads(Path(self._session.end_profiling()).read_text())
            self._session = None
        return [event for event in found if "op_name" in event["args"]]


class OnnxRuntimeProfiler:
    """See diffpress.runtime.engines.executed_layers.Profiler.

    Args:
        recorder: The timed session.
        inputs: Inputs of one evaluation.
        inspected: Events of one run that show the shapes of all weights.
        owners: Tensor -> name of the node that blocked convolutions with this output belong to (`tensor_owners`).
    """

    def __init__(
        self,
        recorder: Recorder,
        inputs: dict[str, np.ndarray],
        inspected: Sequence[Event],
        owners: Mapping[str, str],
    ) -> None:
        self._recorder, self._inputs, self._owners, self._runs = recorder, inputs, owners, 0
        self._shapes = {self._key(event): event["args"] for event in inspected}

    def run(self) -> None:
        """Evaluate the graph once."""
        self._recorder.run(self._inputs)
        self._runs += 1

    def finish(self) -> tuple[list[ExecutedLayer], np.ndarray]:
        """Return the layers and their times; see the protocol."""
        times: dict[str, list[float]] = {}
        nodes: dict[str, Event] = {}
        for event in self._recorder.events():
            key = f"{event['args']['node_index']} {event['name']}"  # kernels that were inserted share their names
            nodes.setdefault(key, event)
            times.setdefault(key, []).append(event["dur"] / 1e3)
        every_run = {key: found for key, found in times.items() if len(found) == self._runs}
        totals = np.cumsum(np.array(list(every_run.values())).reshape(len(every_run), self._runs), axis=1).T
        return [self._layer(nodes[key]) for key in every_run], totals

    def _layer(self, event: Event) -> ExecutedLayer:
        key = self._key(event)
        node: Event = self._shapes.get(key) or event["args"]
        return ExecutedLayer(
            name=key[0].partition(CALL)[0],
            operation=kernel_operation(node),
            kernel=node["op_name"],
            precision=kernel_precision(node),
            macs=kernel_macs(node),
            bytes=kernel_bytes(node),
        )

    def _key(self, event: Event) -> tuple[str, str]:
        """Identify a kernel in both sessions, which number differently what they rewrite: its node and its kind."""
        name = kernel_name(event["name"])
        return self._owners.get(name, name), event["args"]["op_name"]


def tensor_owners(nodes: Sequence[Node]) -> dict[str, str]:
    """Return the output of each convolution -> its name; also that of an activation behind it, which may be fused."""
    owners: dict[str, str] = {}
    for node in nodes:
        if node.kind == "Conv":
            owners[node.outputs[0]] = node.name
        elif node.kind in ACTIVATIONS and node.inputs[0] in owners:
            owners[node.outputs[0]] = owners[node.inputs[0]]
    return owners
