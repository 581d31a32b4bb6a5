"""Activation observers on the inputs and outputs of all layers while the model samples once under its own plan.

A killed run resumes from its last save with an identical result. The save holds the observers' tensors and the network
outputs of the unfinished batch, which are replayed to restore the sampler's state without evaluating the network. A
value that is not finite stops the run immediately; the error names the layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.progress import Advance, progress
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.training.resume import read_state, write_state
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import generate_batches
from diffpress.runtime.solvers import solver_evaluations

CALIBRATION_SEED = 1_000_000  # disjoint from the seeds used for sampling and evaluation
SAVE_EVERY = 8  # evaluations
WHAT = "state of calibration"

# (tensor, index of the evaluation within its batch, samples in the evaluation); raises NonFiniteError
Observer = Callable[[torch.Tensor, int, int], None]
Tensors = Mapping[str, torch.Tensor]


class NonFiniteError(ValueError):
    """A tensor holds a value that is not finite."""


def evaluations_per_batch(checkpoint: Checkpoint) -> int:
    """Return the evaluations per batch under the checkpoint's plan; one evaluation holds both cond and uncond."""
    return solver_evaluations(checkpoint.spec.plan.solver, checkpoint.spec.plan.steps)


def collect_activations(
    checkpoint: Checkpoint,
    observers: Mapping[str, Observer],
    gathered: Tensors,
    what: str,
    config: QuantizeConfig,
    ctx: Context,
) -> None:
    """Generate `config.samples` samples while `observers` see their tensor in every evaluation.

    Args:
        checkpoint: The float checkpoint to sample.
        observers: '<layer>.<input|output>' -> observer of that tensor.
        gathered: The tensors that the observers update; saved in `what`.safetensors in the context's folder.
        what: Name of the run.
        config: Settings of the stage.
        ctx: Data and working folder of the stage.

    Raises:
        InvalidInputError: A value is not finite; the message names the module and the timestep.
    """
    facts = [checkpoint.hash, config.model_dump(mode="json"), ctx.data.hash if ctx.data else None, list(observers)]
    saved = _Saved(ctx.work / f"{what}.safetensors", json.dumps(facts), gathered)
    done, outputs = saved.restore()
    per_batch, batches = evaluations_per_batch(checkpoint), -(-config.samples // config.batch)
    first, outputs = done // per_batch * config.batch, outputs[: done % per_batch]
    if done == per_batch * batches:
        return
    model = checkpoint.shared_model()
    conditioning = ctx.conditions(config.samples).part(slice(first, None))
    seeds = range(CALIBRATION_SEED + first, CALIBRATION_SEED + config.samples)
    with progress(what, batches * per_batch, done) as advance:
        network = _ObservedNetwork(
            TorchNetwork(model, checkpoint.spec), model, saved, outputs, per_batch * batches, advance, done
        )
        try:
            with network.observing(observers):
                for _ in generate_batches(network, checkpoint.spec, seeds, batch=config.batch, conditions=conditioning):
                    network.outputs.clear()
                    network.evaluation = 0
        except NonFiniteError as error:
            raise InvalidInputError(
                f"quantize: {_first_not_finite(network.network, model, network.last_inputs)} is not finite at timestep "
                f"{float(network.last_inputs['timestep'][0]):g} of calibration; sample the unquantized checkpoint to "
                "find the cause"
            ) from error


@dataclass
class _ObservedNetwork:
    """Network with observers; known `outputs` of the current batch are replayed instead of evaluated.

    Attributes:
        network: The network to evaluate.
        model: The module of `network`.
        saved: The file to save progress in.
        outputs: Outputs of the current batch so far.
        total: Number of evaluations of the run.
        advance: Reports progress.
        done: Number of evaluations done.
        evaluation: Index of the next evaluation in its batch.
        last_inputs: Inputs of the last evaluation.
    """

    network: TorchNetwork
    model: nn.Module
    saved: _Saved
    outputs: list[np.ndarray]
    total: int
    advance: Advance
    done: int
    evaluation: int = 0
    last_inputs: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        return self.network.inputs

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        if self.evaluation == len(self.outputs):
            self.outputs.append(self._evaluate(inputs))
            self.done += 1
            self.advance(self.done)
            if self.done % SAVE_EVERY == 0 or self.done == self.total > SAVE_EVERY:
                self.saved.save(self.done, self.outputs)
        self.evaluation += 1
        return self.outputs[self.evaluation - 1]

    def _evaluate(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.last_inputs = inputs
        out = self.network.run(inputs)
        if not np.isfinite(out).all():
            raise NonFiniteError
        return out

    @contextmanager
    def observing(self, observers: Mapping[str, Observer]) -> Iterator[None]:
        modules: dict[str, Any] = dict(self.model.named_modules())
        with ExitStack() as stack:
            for key, observe in observers.items():
                layer, _, side = key.rpartition(".")
                hook = partial(self._observe, observe, side)
                stack.callback(modules[layer].register_forward_hook(hook).remove)
            yield

    def _observe(
        self, observe: Observer, side: str, module: nn.Module, args: tuple[torch.Tensor, ...], out: Any
    ) -> None:
        results = out if isinstance(out, tuple) else (out,)
        observe(args[0] if side == "input" else results[0], self.evaluation, len(self.last_inputs["sample"]))


def _first_not_finite(network: TorchNetwork, model: nn.Module, inputs: dict[str, np.ndarray]) -> str:
    """Describe the first value that is not finite in an evaluation; of nested modules, the innermost."""
    if not np.isfinite(inputs["sample"]).all():
        return "the sample"
    found: list[str] = []

    def check(name: str, module: nn.Module, args: object, out: object) -> None:
        if not found and isinstance(out, torch.Tensor) and not torch.isfinite(out).all():
            found.append(f"the output of layer '{name}'")

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(partial(check, name)).remove)
        network.run(inputs)
    return found[0] if found else "the output"


@dataclass(frozen=True)
class _Saved:
    """The resumable state of a run, in one file that is replaced atomically; only the same `run` reads it."""

    file: Path
    run: str
    gathered: Tensors

    def save(self, done: int, outputs: list[np.ndarray]) -> None:
        tensors = {f"gathered.{name}": tensor for name, tensor in self.gathered.items()}
        tensors |= {f"answer.{i}": torch.from_numpy(np.ascontiguousarray(out)) for i, out in enumerate(outputs)}
        write_state(self.file, tensors, {"done": str(done), "run": self.run}, WHAT)

    def restore(self) -> tuple[int, list[np.ndarray]]:
        """Return the number of evaluations done, and the outputs of those in the unfinished batch."""
        saved = read_state(self.file, WHAT)
        if saved is None or saved[1].get("run") != self.run:
            return 0, []
        tensors, metadata = saved
        for name, own in self.gathered.items():
            own.copy_(tensors[f"gathered.{name}"])
        outputs = [name for name in tensors if name.startswith("answer.")]
        return int(metadata["done"]), [tensors[f"answer.{i}"].numpy() for i in range(len(outputs))]
