"""Observers of the inputs and outputs of layers, and the network that calls them while it is sampled.

A killed run resumes from its last save with an identical result. The save holds the observers' tensors and the network
outputs of the unfinished batch, which are replayed to restore the sampler's state without evaluating the network. A
value that is not finite stops the run immediately; the error names the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from diffpress.compress.distillation.block_features import capture_features, energy_map
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.progress import Advance
from diffpress.compress.quantization.layer_kinds import layer_input
from diffpress.compress.training.resume import read_state, write_state
from diffpress.runtime.errors import InvalidInputError

SAVE_EVERY = 8  # evaluations
WHAT = "state of calibration"
OUTPUT, ENERGY, HELD = "output", "energy.", "held."

# (tensor, index of the evaluation within its batch, samples in the evaluation); raises NonFiniteError
Observer = Callable[[torch.Tensor, int, int], None]
Arrays = dict[str, np.ndarray]


class NonFiniteError(ValueError):
    """A tensor holds a value that is not finite."""


class CalibrationData(Protocol):
    """A model with the inputs that it is calibrated on (trajectory_dataset.py, ../components.py)."""

    @property
    def model(self) -> nn.Module:
        """The float model."""
        ...

    @property
    def evaluations_per_batch(self) -> int:
        """Number of different evaluations, such as the timesteps of a sampling plan."""
        ...

    def observe(self, what: str, observers: Mapping[str, Observer], gathered: Mapping[str, torch.Tensor]) -> None:
        """Evaluate the model on all inputs with these observers; `what` names the run, `gathered` what it updates."""
        ...


@dataclass(frozen=True)
class SavedRun:
    """The resumable state of a run, in one file that is replaced atomically; only the same `run` reads it.

    Attributes:
        file: The safetensors file.
        run: Text that identifies the run.
        gathered: Tensors that the observers update in place.
    """

    file: Path
    run: str
    gathered: Mapping[str, torch.Tensor]

    def save(self, done: int, returned: Sequence[Arrays]) -> None:
        """Save the number of evaluations done, and what those of the unfinished batch returned."""
        tensors = {f"gathered.{name}": tensor for name, tensor in self.gathered.items()}
        for i, results in enumerate(returned):
            tensors |= {f"returned.{i}.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in results.items()}
        write_state(self.file, tensors, {"done": str(done), "run": self.run}, WHAT)

    def restore(self) -> tuple[int, list[Arrays]]:
        """Return what `save` was given, and update `gathered`; (0, []) if nothing is saved."""
        saved = read_state(self.file, WHAT)
        if saved is None or saved[1].get("run") != self.run:
            return 0, []
        tensors, metadata = saved
        for name, own in self.gathered.items():
            own.copy_(tensors[f"gathered.{name}"])
        returned: dict[int, Arrays] = {}
        for name, tensor in tensors.items():
            if name.startswith("returned."):
                _, index, key = name.split(".", 2)
                returned.setdefault(int(index), {})[key] = tensor.numpy()
        return int(metadata["done"]), [returned[index] for index in sorted(returned)]


@dataclass
class ObservedNetwork:
    """Network whose layers are observed; known results of the current batch are replayed instead of evaluated.

    Attributes:
        model: The module.
        network: The network that evaluates it.
        blocks: Names of the blocks whose energy maps are recorded with the output.
        saved: The file to save progress in; None for none.
        advance: Reports progress.
        total: Number of evaluations of the run.
        done: Number of evaluations done.
        returned: What the evaluations of the current batch returned: the output, and the energy maps by block.
        visited: Inputs of the evaluations of the current batch.
    """

    model: nn.Module
    network: TorchNetwork
    blocks: Sequence[str]
    saved: SavedRun | None
    advance: Advance
    total: int
    done: int
    returned: list[Arrays]
    visited: list[Arrays] = field(default_factory=list)

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """Names and dtypes of the network's inputs."""
        return self.network.inputs

    def run(self, inputs: Arrays) -> np.ndarray:
        """Return the network's output [B, C, H, W]."""
        return self._known(inputs, lambda: {OUTPUT: self.network.run(inputs)})[OUTPUT]

    def run_full(self, inputs: Arrays) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the network's output, and the features that cached steps reuse."""

        def evaluate() -> Arrays:
            out, features = self.network.run_full(inputs)
            return {OUTPUT: out} | {f"{HELD}{index}": feature for index, feature in enumerate(features)}

        known = self._known(inputs, evaluate)
        return known[OUTPUT], [known[name] for name in sorted(name for name in known if name.startswith(HELD))]

    def run_cached(self, inputs: Arrays, features: list[np.ndarray]) -> np.ndarray:
        """Return the network's output with features of an earlier evaluation; all layers are observed."""
        return self._known(inputs, lambda: {OUTPUT: self.network.run_cached(inputs, features)})[OUTPUT]

    def _known(self, inputs: Arrays, evaluate: Callable[[], Arrays]) -> Arrays:
        """Return what the next evaluation of the batch returns: as it was saved, or of `evaluate`."""
        self.visited.append(inputs)
        if len(self.visited) > len(self.returned):
            self.returned.append(self._evaluated(evaluate))
            self.done += 1
            self.advance(self.done)
            if self.saved and (self.done % SAVE_EVERY == 0 or self.done == self.total > SAVE_EVERY):
                self.saved.save(self.done, self.returned)
        return self.returned[len(self.visited) - 1]

    def next_batch(self) -> None:
        """Forget the evaluations of the finished batch."""
        self.returned.clear()
        self.visited.clear()

    @contextmanager
    def observing(self, observers: Mapping[str, Observer]) -> Iterator[None]:
        """Call `observers`, '<layer>.<input|output>' -> observer, in every evaluation inside the context.

        Raises:
            InvalidInputError: A value is not finite; the message names the module and the timestep.
        """
        try:
            with observe_layers(self.model, observers, self._position):
                yield
        except NonFiniteError as error:
            inputs = self.visited[-1]
            raise InvalidInputError(
                f"quantize: {_first_not_finite(self.network, self.model, inputs)} is not finite at timestep "
                f"{float(inputs['timestep'][0]):g} of calibration; sample the unquantized checkpoint to find the cause"
            ) from error

    def _evaluated(self, evaluate: Callable[[], Arrays]) -> Arrays:
        with capture_features(self.model, self.blocks) as features:
            found = evaluate()
        if not np.isfinite(found[OUTPUT]).all():
            raise NonFiniteError
        return found | {f"{ENERGY}{name}": energy_map(x).cpu().numpy() for name, x in features.items()}

    def _position(self, seen: torch.Tensor) -> tuple[int, int]:
        return len(self.visited) - 1, len(self.visited[-1]["sample"])


@contextmanager
def observe_layers(
    model: nn.Module, observers: Mapping[str, Observer], position: Callable[[torch.Tensor], tuple[int, int]]
) -> Iterator[None]:
    """Call `observers`, '<layer>.<input|output>' -> observer, in every evaluation of the model inside the context.

    `position` returns the index of the present evaluation and its number of samples, given the tensor.
    """

    def hook(
        observe: Observer, side: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        results = out if isinstance(out, tuple) else (out,)
        seen = layer_input(args, kwargs) if side == "input" else results[0]
        observe(seen, *position(seen))

    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for key, observe in observers.items():
            layer, _, side = key.rpartition(".")
            stack.callback(modules[layer].register_forward_hook(partial(hook, observe, side), with_kwargs=True).remove)
        yield


def _first_not_finite(network: TorchNetwork, model: nn.Module, inputs: Arrays) -> str:
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
