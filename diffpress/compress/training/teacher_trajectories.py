"""Trajectories of the teacher, made once and kept on disk: what students learn from where there are no images.

    path i = the teacher's states at the wanted points of a plan, from the noise of seed i under condition i

Every 256 paths are a file of their own, put in place by one rename: a run that was killed makes only those that are
missing, and a batch reads its rows from the disk, so that memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.progress import progress
from diffpress.compress.training import distributed
from diffpress.runtime.denoiser import plan_denoiser
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.sampler import initial_std, noise_for, sample
from diffpress.runtime.sampling_plan import SamplingPlan, plan_levels

ROWS = 256
BATCH, LATENT_BATCH = 64, 4

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TeacherTrajectories:
    """`count` paths of the teacher by `plan`, each float32 [P, C, H, W]: its states before the steps `kept` and, last,
    the end. `conditions` tell them apart, and seeds from `seed` on; `folder` keeps them.
    """

    teacher: Checkpoint
    plan: SamplingPlan
    kept: tuple[int, ...]
    count: int
    conditions: ConditioningInputs
    seed: int
    folder: Path

    def make(self) -> None:
        """Make what is missing now and not at the first batch; of several processes each makes its share."""
        self._make_missing(list(self._spans)[distributed.index() :: distributed.count()])
        distributed.wait()
        len(self._files)

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, Tensors]:
        """Random paths, float32 [B, P, C, H, W], and what they were told, [B, ...] by input name."""
        picks = torch.randint(0, self.count, (size,), generator=generator).numpy()
        rows = np.stack([self._files[pick // ROWS][pick % ROWS] for pick in picks])
        cond = {name: torch.from_numpy(array[picks]) for name, array in self.conditions.cond.items()}
        return torch.from_numpy(rows), cond

    @cached_property
    def _files(self) -> list[np.ndarray]:
        """The rows of every file, mapped and not read; made here where they are missing."""
        self._make_missing(self._spans)
        return [_mapped(path) for path in self._spans]

    @cached_property
    def _spans(self) -> dict[Path, range]:
        """Which paths every file holds."""
        spans = (range(start, min(start + ROWS, self.count)) for start in range(0, self.count, ROWS))
        return {self.folder / self._name(span): span for span in spans}

    def _name(self, span: range) -> str:
        cond = self.conditions.part(slice(span.start, span.stop)).cond
        digests = [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in cond.values()]
        facts = [self.teacher.hash, asdict(self.plan), self.kept, self.seed, span.start, span.stop, digests]
        return f"paths-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.npy"

    def _make_missing(self, wanted: Iterable[Path]) -> None:
        missing = {path: self._spans[path] for path in wanted if not path.is_file()}
        if missing:
            self._make(missing)

    def _make(self, missing: Mapping[Path, range]) -> None:
        spec = self.teacher.spec.with_plan(self.plan)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pixels = ROWS if device == "cuda" else BATCH  # a GPU is no faster with fewer
        batch, done = pixels if spec.is_pixel_space else LATENT_BATCH, 0
        with progress("samples of the teacher", sum(map(len, missing.values()))) as advance:
            network = TorchNetwork(self.teacher.model.to(device), spec)
            for path, span in missing.items():
                parts = []
                for first in range(span.start, span.stop, batch):
                    parts.append(self._run_fused(network, range(first, min(first + batch, span.stop))))
                    done += len(parts[-1])
                    advance(done)
                _write(path, np.concatenate(parts))
        self.teacher.model.to("cpu")

    def _run_fused(self, network: TorchNetwork, members: range) -> np.ndarray:
        """float32 [len(members), P, C, H, W]."""
        plan, spec = self.plan, self.teacher.spec.with_plan(self.plan)
        denoise = plan_denoiser(network, spec, self.conditions.part(slice(members.start, members.stop)))
        seeds = [self.seed + member for member in members]
        noise = noise_for(seeds, spec.sample_shape)
        steps = sample(denoise, noise, spec.schedule, plan, lambda k: noise_for(seeds, spec.sample_shape, stream=k))
        first = plan_levels(spec.schedule, plan.timesteps)[0]
        states = {0: np.float32(initial_std(first, plan.start)) * noise}
        for step in steps:
            if step.index + 1 in self.kept or step.index + 1 == plan.steps:
                states[step.index + 1] = step.x
        return np.stack([states[index] for index in (*self.kept, plan.steps)], axis=1)


def _mapped(path: Path) -> np.ndarray:
    """The array in a file, read from the disk row by row as it is asked for."""
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInputError(f"{path}: cannot be read ({error}); delete it, and it is made again") from error
    return rows


def _write(path: Path, rows: np.ndarray) -> None:
    temporary = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInputError(f"{path}: cannot be written ({reason}); make space and run again") from error
