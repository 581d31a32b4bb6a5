"""States that a model visits while it samples under its own plan: the data of every quantization method.

    state = the inputs of one network evaluation, and the network's output there      (EfficientDM, He et al. 2023)

Trajectories are sampled once. Observers see the activations of every layer meanwhile; a method that needs the same
states later evaluates the recorded inputs again, or draws some of them. This needs no images, and only contains
timesteps that sampling visits. Each batch is a file of which single rows are read, so memory does not grow with the
number of trajectories. If nothing will read the states, none are recorded.

A plan with a step cache is sampled with it: its states are those of the steps that are evaluated. Recorded states of
cached steps are evaluated again in full.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.progress import progress
from diffpress.compress.quantization.calibration.observer import (
    ENERGY,
    HELD,
    OUTPUT,
    Arrays,
    ObservedNetwork,
    Observer,
    SavedRun,
)
from diffpress.compress.seeds import CALIBRATION_SEED
from diffpress.compress.training import distributed
from diffpress.compress.training.resume import read_state, write_state
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.sampler import evaluated_levels, generate_batches
from diffpress.runtime.spec import DenoiserSpec

FINAL = "final samples"

Tensors = dict[str, torch.Tensor]


class States(NamedTuple):
    """Drawn states.

    Attributes:
        inputs: Network inputs [N, ...] by name.
        outputs: The network's outputs [N, C, H, W].
        energies: Energy maps [N, ...] by block (distillation/block_features.py), if they are recorded.
    """

    inputs: Tensors
    outputs: torch.Tensor
    energies: Tensors


@dataclass(frozen=True)
class TrajectoryDataset:
    """Trajectories of one model, sampled when they are first needed.

    Attributes:
        model: The model. On a machine with a GPU, a copy is sampled there in full float32 precision.
        spec: Its spec, under whose plan it is sampled.
        conditions: Returns the conditioning of that many trajectories.
        samples: Number of trajectories that observers see.
        trained_on: Number of trajectories that QAT trains on.
        batch: Trajectories sampled together.
        work: Folder of the files.
        run: Text that identifies the model and its settings; files of another run are not used.
        recorded: Whether the states are recorded.
        keeps_final: Whether `final_samples` will be read.
        blocks: Names of the blocks whose energy maps are recorded.
    """

    model: nn.Module
    spec: DenoiserSpec
    conditions: Callable[[int], ConditioningInputs]
    samples: int
    trained_on: int
    batch: int
    work: Path
    run: str
    recorded: bool = True
    keeps_final: bool = False
    blocks: tuple[str, ...] = ()

    @property
    def evaluations_per_batch(self) -> int:
        """Evaluations in which one batch is sampled; each holds both cond and uncond."""
        return len(evaluated_levels(self.spec))

    @cached_property
    def conditioning(self) -> ConditioningInputs:
        """Conditioning of the first `samples` trajectories."""
        return self._conditioning.part(slice(self.samples))

    def observe(self, what: str, observers: Mapping[str, Observer], gathered: Mapping[str, torch.Tensor]) -> None:
        """Evaluate the model on all states of the first `samples` trajectories.

        Args:
            what: Name of the run, which resumes after a kill.
            observers: '<layer>.<input|output>' -> observer of that tensor.
            gathered: Tensors that the observers update; saved in `what`.safetensors.

        Raises:
            InvalidInputError: A value is not finite; the message names the module and the timestep.
        """
        self._run(what, self._spans(self.samples), observers, gathered)

    def draw(self, size: int, generator: torch.Generator, trajectories: int | None = None) -> States:
        """Draw `size` states, uniformly over all rows of all evaluations, with replacement.

        They are drawn from the first `trajectories`, by default `samples`.
        """
        files = self._files[: len(self._spans(trajectories or self.samples))]
        evaluations = [(file, index) for file in files for index in range(len(file.rows))]
        ends = np.cumsum([file.rows[index] for file, index in evaluations])
        picks = torch.randint(0, int(ends[-1]), (size,), generator=generator).numpy()
        rows = []
        for pick in picks:
            place = int(np.searchsorted(ends, pick, "right"))
            file, index = evaluations[place]
            rows.append(file.read(index, int(pick - ends[place]) + file.rows[index]))
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        outputs = stacked.pop(OUTPUT)
        energies = {name: stacked.pop(name) for name in list(stacked) if name.startswith(ENERGY)}
        return States(stacked, outputs, {name.removeprefix(ENERGY): value for name, value in energies.items()})

    def final_samples(self) -> np.ndarray:
        """Return the samples [N, ...] at the end of the first `samples` trajectories."""
        spans = self._spans(self.samples)
        missing = [span for span in spans if self._final(span) is None]
        if missing:
            self._run("trajectories", missing, {}, {})
        return np.concatenate([found for span in spans if (found := self._final(span)) is not None])

    def _spans(self, stop: int) -> list[range]:
        """Return the trajectories of each batch up to `stop`; no batch crosses `samples` or `trained_on`."""
        cuts = sorted({0, *(cut for cut in (self.samples, self.trained_on) if cut < stop), stop})
        return [
            range(start, min(start + self.batch, last))
            for first, last in pairwise(cuts)
            for start in range(first, last, self.batch)
        ]

    @cached_property
    def _files(self) -> list[_StateFile]:
        """The files of all batches; trajectories that were not sampled yet are sampled here."""
        spans = self._spans(max(self.samples, self.trained_on))
        missing = [span for span in spans if not self._is_recorded(span)]
        if missing:
            self._run("trajectories", missing, {}, {})
        return [_StateFile(self._path(span)) for span in spans]

    def _run(
        self, what: str, spans: list[range], observers: Mapping[str, Observer], gathered: Mapping[str, torch.Tensor]
    ) -> None:
        """Evaluate the batches `spans`, whose states are read or, the first time, visited by sampling."""
        facts = json.dumps([self.run, list(observers), [span.start for span in spans]])
        # without observers, the recorded batches themselves are what is done
        saved = SavedRun(self.work / f"{what}.safetensors", facts, gathered) if observers else None
        done, returned = saved.restore() if saved else (0, [])
        per_batch = self.evaluations_per_batch
        finished, total = done // per_batch, per_batch * len(spans)
        if finished == len(spans):
            return
        with progress(what, total, done) as advance, on_best_device(self.model, self.batch) as model:
            network = ObservedNetwork(
                model,
                TorchNetwork(model, self.spec),
                self.blocks,
                saved,
                advance,
                total,
                done,
                returned[: done % per_batch],
            )
            with network.observing(observers):
                for span in spans[finished:]:
                    self._visit(network, span)
                    network.next_batch()

    def _visit(self, network: ObservedNetwork, span: range) -> None:
        if self.recorded and self._is_recorded(span) and not (self.keeps_final and self._final(span) is None):
            file = _StateFile(self._path(span))
            for index in range(len(file.rows)):
                network.run(file.inputs(index))
            return
        seeds = range(CALIBRATION_SEED + span.start, CALIBRATION_SEED + span.stop)
        conditioning = self._conditioning.part(slice(span.start, span.stop))
        batches = generate_batches(network, self.spec, seeds, batch=len(span), conditions=conditioning)
        final = torch.from_numpy(np.concatenate(list(batches)))
        if self.keeps_final:
            write_state(self._final_path(span), {FINAL: final}, {"run": self.run}, FINAL, every_process=True)
        if self.recorded:
            _write(self._path(span), self.run, network.visited, network.returned)

    @cached_property
    def _conditioning(self) -> ConditioningInputs:
        return self.conditions(max(self.samples, self.trained_on))

    def _path(self, span: range) -> Path:
        # a folder per process, so that none reads a file that another is writing
        return self.work / f"trajectories-{distributed.index()}" / f"{span.start:06d}-{span.stop:06d}.safetensors"

    def _final_path(self, span: range) -> Path:
        return self._path(span).with_suffix(".final.safetensors")

    def _final(self, span: range) -> np.ndarray | None:
        """Return the final samples of a batch, if this run has sampled it."""
        saved = read_state(self._final_path(span), FINAL)
        return None if saved is None or saved[1].get("run") != self.run else saved[0][FINAL].numpy()

    def _is_recorded(self, span: range) -> bool:
        path = self._path(span)
        return path.is_file() and _StateFile(path).run == self.run


@contextmanager
def on_best_device(model: nn.Module, batch: int) -> Iterator[nn.Module]:
    """Yield the model, or a copy on the GPU if there is one; convolutions there do not round to TF32."""
    if not torch.cuda.is_available():
        yield model
        return
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield copy.deepcopy(model).to("cuda")
    except torch.OutOfMemoryError as error:
        raise InvalidInputError(
            f"out of GPU memory with a batch of {batch}; lower batch or samples, or use the CPU with "
            "CUDA_VISIBLE_DEVICES=''"
        ) from error


class _StateFile:
    """Evaluations of one batch: '<evaluation>.<name>' -> [B, ...]; an array that several share is stored once."""

    def __init__(self, path: Path) -> None:
        try:
            self._tensors = cast(Any, safe_open(path, framework="pt"))
            metadata = self._tensors.metadata()
            self.run: str = metadata["run"]
            self._evaluations: list[dict[str, str]] = json.loads(metadata["evaluations"])
            self.rows: list[int] = json.loads(metadata["rows"])  # B of each evaluation
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"{path}: cannot be read ({error}); delete it to start over") from error

    def inputs(self, index: int) -> Arrays:
        """Return the inputs of an evaluation."""
        names = self._evaluations[index]
        inputs = [name for name in names if name != OUTPUT and not name.startswith(ENERGY)]
        return {name: self._tensors.get_tensor(names[name]).numpy() for name in inputs}

    def read(self, index: int, row: int) -> Tensors:
        """Return one row of everything in an evaluation."""
        return {name: self._tensors.get_slice(stored)[row] for name, stored in self._evaluations[index].items()}


def _write(path: Path, run: str, visited: list[Arrays], returned: list[Arrays]) -> None:
    tensors: Tensors = {}
    stored: dict[int, str] = {}  # id of an array -> its name in the file
    evaluations = []
    for index, (inputs, results) in enumerate(zip(visited, returned, strict=True)):
        names = {}
        recorded = {name: array for name, array in results.items() if not name.startswith(HELD)}
        for name, array in {**inputs, **recorded}.items():
            if id(array) not in stored:
                stored[id(array)] = f"{index}.{name}"
                tensors[f"{index}.{name}"] = torch.from_numpy(np.ascontiguousarray(array))
            names[name] = stored[id(array)]
        evaluations.append(names)
    rows = [len(inputs["sample"]) for inputs in visited]
    metadata: dict[str, Any] = {"run": run, "evaluations": json.dumps(evaluations), "rows": json.dumps(rows)}
    write_state(path, tensors, metadata, "recorded states", every_process=True)
