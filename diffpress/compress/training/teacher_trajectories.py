"""Trajectories of the teacher, generated once and kept on disk: training data that needs no images.

    trajectory i = the teacher's states at chosen steps of a plan, from seed `seed` + i with conditioning i

Each file holds 256 trajectories and is written atomically by a rename: a resumed run generates only the missing files.
A batch reads its rows from disk, so memory does not grow with the number of trajectories.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from diffpress.runtime.io.arrays import memory_map
from diffpress.runtime.io.files import atomic
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.sampler import initial_std, noise_for, sample
from diffpress.runtime.sampling_plan import SamplingPlan, plan_levels

ROWS_PER_FILE = 256
BATCH = 64  # samples together on a processor
LATENT_VALUES = 2**16  # of the latents together: four of 4 x 64 x 64

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TeacherTrajectories:
    """Trajectories of a teacher, each float32 [P, ...].

    A trajectory holds the states before the steps `kept`, followed by the final state.

    Attributes:
        teacher: The checkpoint to sample from.
        plan: Sampling plan of the trajectories.
        kept: Indices of the steps whose initial states are kept, P - 1 of them.
        count: Number of trajectories.
        conditions: Conditioning of each trajectory.
        seed: Seed of the first trajectory; each further one adds 1.
        folder: Folder of the files.
    """

    teacher: Checkpoint
    plan: SamplingPlan
    kept: tuple[int, ...]
    count: int
    conditions: ConditioningInputs
    seed: int
    folder: Path

    def generate(self) -> None:
        """Generate the missing files now, divided among the processes, rather than at the first batch."""
        self._generate_missing(list(self._spans)[distributed.index() :: distributed.count()])
        distributed.wait()
        len(self._files)

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, Tensors]:
        """Draw random trajectories, float32 [B, P, ...], and their conditioning [B, ...] by name."""
        picks = torch.randint(0, self.count, (size,), generator=generator).numpy()
        rows = np.stack([self._files[pick // ROWS_PER_FILE][pick % ROWS_PER_FILE] for pick in picks])
        cond = {name: torch.from_numpy(array[picks]) for name, array in self.conditions.cond.items()}
        return torch.from_numpy(rows), cond

    @cached_property
    def _files(self) -> list[np.ndarray]:
        """The rows of every file, memory-mapped; missing files are generated here."""
        self._generate_missing(self._spans)
        return [memory_map(path) for path in self._spans]

    @cached_property
    def _spans(self) -> dict[Path, range]:
        """Range of trajectories of each file."""
        spans = (range(start, min(start + ROWS_PER_FILE, self.count)) for start in range(0, self.count, ROWS_PER_FILE))
        return {self.folder / self._name(span): span for span in spans}

    def _name(self, span: range) -> str:
        cond = self.conditions.part(slice(span.start, span.stop)).cond
        digests = [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in cond.values()]
        facts = [self.teacher.hash, asdict(self.plan), self.kept, self.seed, span.start, span.stop, digests]
        return f"paths-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.npy"

    def _generate_missing(self, paths: Iterable[Path]) -> None:
        missing = {path: self._spans[path] for path in paths if not path.is_file()}
        if missing:
            self._generate(missing)

    def _generate(self, missing: Mapping[Path, range]) -> None:
        spec = self.teacher.spec.with_plan(self.plan)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        most = ROWS_PER_FILE if device == "cuda" else BATCH  # smaller batches are no faster on a GPU
        fitting = max(4, LATENT_VALUES // math.prod(spec.sample_shape))
        batch, done = most if spec.is_pixel_space else min(most, fitting), 0
        with progress("samples of the teacher", sum(map(len, missing.values()))) as advance:
            network = TorchNetwork(self.teacher.model.to(device), spec)
            for path, span in missing.items():
                chunks = []
                for first in range(span.start, span.stop, batch):
                    chunks.append(self._sample(network, range(first, min(first + batch, span.stop))))
                    done += len(chunks[-1])
                    advance(done)
                with atomic(path, "free disk space and run again") as temporary, temporary.open("wb") as file:
                    np.save(file, np.concatenate(chunks), allow_pickle=False)
        self.teacher.model.to("cpu")

    def _sample(self, network: TorchNetwork, members: range) -> np.ndarray:
        """Sample the trajectories `members`, float32 [len(members), P, ...]."""
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
