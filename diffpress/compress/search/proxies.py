"""Cheap measurements of a trial: latency and size from a table, and the error of its samples against the teacher's.

    error_db = -10 log10 (sum |x_teacher|^2 / sum |x_trial - x_teacher|^2)     same noise, each under its own plan

The error is lower for better trials. It needs no features, no export and few samples, but compares only trials of the
same kind of distillation: a few-step student may give another image from the same noise that is just as good. From
trials whose Frechet distance was measured, `estimated_ratio` reads the distance of one whose error alone is known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.evaluation.metrics import mean_sqnr_db
from diffpress.compress.evaluation.open_subject import checkpoint_subject
from diffpress.compress.models.counts import is_large
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.seeds import SELECTION_SEED
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json, write_json
from diffpress.runtime.sampler import generate_batches

COMPARED, COMPARED_LARGE = 32, 4
BATCH = 16


class Cost(NamedTuple):
    """Cost of a network in an engine: time of a step as a ratio to the teacher's fp32 graph, and size of its file."""

    step_ratio: float
    size_mib: float


class LatencyTable:
    """Costs by network and format, each measured once.

    Two checkpoints share an entry if their tensors have the same shapes and formats: weights do not change the time.
    With the same table, a search proposes the same trials.
    """

    def __init__(self, file: Path, engine: str, teacher: str) -> None:
        self._file = file
        self._owner = {"engine": engine, "teacher": teacher}
        stored = read_json(file) if file.is_file() else {}
        for name, value in self._owner.items():
            if stored and stored.get(name) != value:
                raise InvalidInputError(
                    f"{file}: was measured with another {name} ({stored.get(name)}); remove the file, or choose "
                    "another --out"
                )
        self._costs: dict[str, dict[str, float]] = stored.get("costs", {})

    def cost(self, key: str, measure: Callable[[], Cost]) -> Cost:
        """Return the entry; `measure` is called, and its result stored, if there is none."""
        if key not in self._costs:
            self._costs[key] = measure()._asdict()
            write_json(self._file, {**self._owner, "costs": self._costs})
        return Cost(**self._costs[key])


def latency_key(checkpoint: Checkpoint, precision: str) -> str:
    """Return the table's key of a checkpoint: a hash of its tensors' shapes and formats, and its precision."""
    quantization = checkpoint.quantization
    shapes = sorted((name, list(tensor.shape)) for name, tensor in checkpoint.model.state_dict().items())
    formats = {} if quantization is None else quantization.layer_formats
    scales = [] if quantization is None else sorted(quantization.amax)
    facts = json.dumps([shapes, formats, scales, precision], sort_keys=True)
    kind = precision if quantization is None else quantization.format
    return f"{kind}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def compared_samples(checkpoint: Checkpoint, texts: Sequence[str] = ()) -> np.ndarray:
    """Return samples [N, ...] under the checkpoint's plan, from the noise that a search compares, in torch."""
    network = TorchNetwork(fake_quantized(checkpoint), checkpoint.spec)
    subject = checkpoint_subject(checkpoint, network, texts)
    count = compared_count(checkpoint)
    seeds, conditions = np.arange(count) + SELECTION_SEED, subject.conditions(count)
    return np.concatenate(list(generate_batches(network, subject.spec, seeds, batch=BATCH, conditions=conditions)))


def compared_count(checkpoint: Checkpoint) -> int:
    """Return the number of samples that are compared."""
    return COMPARED_LARGE if is_large(checkpoint.model) else COMPARED


def error_db(teacher: np.ndarray, found: np.ndarray) -> float:
    """Return the error of samples against the teacher's, in dB: the negative mean SQNR."""
    return -mean_sqnr_db(teacher, found)


def estimated_ratio(error: float, measured: Sequence[tuple[float, float]]) -> float:
    """Return the Frechet ratio at this error, read from (error, ratio) of measured trials.

    The ratio is taken to grow with the error: linear between measured trials, constant beyond them.
    """
    points = sorted(measured)
    ratios = np.maximum.accumulate([ratio for _, ratio in points])
    return float(np.interp(error, [at for at, _ in points], ratios))
