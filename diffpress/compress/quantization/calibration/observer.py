"""The model samples by its own plan, and what its layers read and write is watched: one run for all layers.

A run that was killed goes on where it was saved last and ends as an undisturbed one: saved are what the watches have
gathered and what the network answered to the calls of the batch at hand, with which the sampler gets back to where it
was without asking the network. A value that is not finite ends the run at once, naming where it came up.
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
from diffpress.compress.config import QuantizeConfig
from diffpress.compress.context import Context
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.progress import Advance, progress
from diffpress.compress.training.resume import read_state, write_state
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import generate_batches
from diffpress.runtime.solvers import solver_evaluations

CALIBRATION_SEED = 1_000_000  # far from the seeds that people sample and evaluate with
SAVE_EVERY = 8  # calls
WHAT = "state of calibration"

# (tensor, number of the call within its batch, samples in the call); raises NonFiniteError for a tensor that is not
Observer = Callable[[torch.Tensor, int, int], None]
Tensors = Mapping[str, torch.Tensor]


class NonFiniteError(ValueError):
    """A tensor holds a value that is not finite."""


def evaluations_per_batch(checkpoint: Checkpoint) -> int:
    """How often the network is called for one batch by the checkpoint's plan (under guidance with both halves)."""
    return solver_evaluations(checkpoint.spec.plan.solver, checkpoint.spec.plan.steps)


def collect_activations(
    checkpoint: Checkpoint,
    observers: Mapping[str, Observer],
    gathered: Tensors,
    what: str,
    config: QuantizeConfig,
    ctx: Context,
) -> None:
    """Make `config.samples` samples while `observers`, by '<layer>.<input|output>', see that tensor of every call.

    `gathered` are the tensors that the watches change; they are saved as, and restored from, `what`.safetensors in the
    context's folder. Raises InvalidInputError, naming the module and the timestep, at the first value that is not finite.
    """
    facts = [checkpoint.hash, config.model_dump(mode="json"), ctx.data.hash if ctx.data else None, list(observers)]
    saved = _Saved(ctx.work / f"{what}.safetensors", json.dumps(facts), gathered)
    done, answers = saved.restore()
    calls, batches = evaluations_per_batch(checkpoint), -(-config.samples // config.batch)
    first, answers = done // calls * config.batch, answers[: done % calls]
    if done == calls * batches:
        return
    model = checkpoint.shared_model()
    conditioning = ctx.conditions(config.samples).part(slice(first, None))
    seeds = range(CALIBRATION_SEED + first, CALIBRATION_SEED + config.samples)
    with progress(what, batches * calls, done) as advance:
        network = _ObservedNetwork(
            TorchNetwork(model, checkpoint.spec), model, saved, answers, calls * batches, advance, done
        )
        try:
            with network.observing(observers):
                for _ in generate_batches(network, checkpoint.spec, seeds, batch=config.batch, conditions=conditioning):
                    network.answers.clear()
                    network.call = 0
        except NonFiniteError as error:
            raise InvalidInputError(
                f"quantize: {_first_not_finite(network.network, model, network.asked)} is not finite at timestep "
                f"{float(network.asked['timestep'][0]):g} of calibration; sample the checkpoint as it is, and mend "
                "what made it so"
            ) from error


@dataclass
class _ObservedNetwork:
    """The network under watch; the first calls of a batch are answered from `answers`, where those are known.

    `call` is the next one's number in its batch, `done` counts those that the network was asked, of `total`, and
    `asked` is what it was asked last.
    """

    network: TorchNetwork
    model: nn.Module
    saved: _Saved
    answers: list[np.ndarray]
    total: int
    advance: Advance
    done: int
    call: int = 0
    asked: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        return self.network.inputs

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        if self.call == len(self.answers):
            self.answers.append(self._ask(inputs))
            self.done += 1
            self.advance(self.done)
            if self.done % SAVE_EVERY == 0 or self.done == self.total > SAVE_EVERY:
                self.saved.save(self.done, self.answers)
        self.call += 1
        return self.answers[self.call - 1]

    def _ask(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.asked = inputs
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
                see = partial(self._see, observe, side)
                stack.callback(modules[layer].register_forward_hook(see).remove)
            yield

    def _see(self, observe: Observer, side: str, module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
        results = out if isinstance(out, tuple) else (out,)
        observe(args[0] if side == "input" else results[0], self.call, len(self.asked["sample"]))


def _first_not_finite(network: TorchNetwork, model: nn.Module, inputs: dict[str, np.ndarray]) -> str:
    """What the call makes first that is not finite, in words: of nested modules the innermost."""
    if not np.isfinite(inputs["sample"]).all():
        return "the sample"
    found: list[str] = []

    def look(name: str, module: nn.Module, args: object, out: object) -> None:
        if not found and isinstance(out, torch.Tensor) and not torch.isfinite(out).all():
            found.append(f"the output of layer '{name}'")

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(partial(look, name)).remove)
        network.run(inputs)
    return found[0] if found else "the output"


@dataclass(frozen=True)
class _Saved:
    """What a killed run needs to go on, in one file: put in place by one rename, and read by the same `run` alone."""

    file: Path
    run: str
    gathered: Tensors

    def save(self, done: int, answers: list[np.ndarray]) -> None:
        tensors = {f"gathered.{name}": tensor for name, tensor in self.gathered.items()}
        tensors |= {f"answer.{i}": torch.from_numpy(np.ascontiguousarray(out)) for i, out in enumerate(answers)}
        write_state(self.file, tensors, {"done": str(done), "run": self.run}, WHAT)

    def restore(self) -> tuple[int, list[np.ndarray]]:
        """How many calls were done, and the answers to those of the unfinished batch."""
        saved = read_state(self.file, WHAT)
        if saved is None or saved[1].get("run") != self.run:
            return 0, []
        tensors, metadata = saved
        for name, own in self.gathered.items():
            own.copy_(tensors[f"gathered.{name}"])
        answers = [name for name in tensors if name.startswith("answer.")]
        return int(metadata["done"]), [tensors[f"answer.{i}"].numpy() for i in range(len(answers))]
