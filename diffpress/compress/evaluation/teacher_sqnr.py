"""SQNR between a checkpoint's output and the teacher's, computed after every stage.

Both networks are evaluated on the same noised inputs at timesteps from low to high noise. The SQNR tracks a model
through the stages; the quality of its samples is measured by `evaluate`.
"""

from __future__ import annotations

import numpy as np
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Data
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.adapter import dummy_inputs
from diffpress.compress.models.counts import is_large
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.training.losses import add_noise, forward
from diffpress.compress.training.teacher_data import TeacherData
from diffpress.runtime.network_inputs import SAMPLE, TIMESTEP

BATCH = 16
LARGE_BATCH = 2  # for models whose evaluation takes seconds
SHARES = (0.1, 0.4, 0.7, 0.95)  # fractions of the last timestep


def teacher_sqnr_db(checkpoint: Checkpoint, teacher: Checkpoint, data: Data | None) -> float:
    """Return the SQNR in dB of `checkpoint`'s output relative to `teacher`'s; quantized checkpoints are fake-quantized.

    Uses real samples if there are any, else pure noise with dummy conditioning: generating samples with the teacher
    would cost more than the stage itself.
    """
    spec, generator = teacher.spec, torch.Generator().manual_seed(0)
    batch = LARGE_BATCH if is_large(teacher.model) else BATCH
    if data is not None and not isinstance(data, TeacherData):
        x0, conditions = data.batch(batch, generator)
    else:
        x0, inputs = torch.zeros(batch, *spec.sample_shape), dummy_inputs(spec, batch)
        conditions = {name: value for name, value in inputs.items() if name not in (SAMPLE, TIMESTEP)}
    model, expected, found = fake_quantized(checkpoint), [], []
    with torch.no_grad():
        for share in SHARES:
            t = torch.full((batch,), round(share * (len(spec.schedule) - 1)))
            x_t = add_noise(spec, x0, torch.randn(x0.shape, generator=generator), t)
            expected.append(forward(teacher.model, spec, x_t, t, conditions).numpy())
            found.append(forward(model, spec, x_t, t, conditions).numpy())
    return round(sqnr_db(np.concatenate(expected), np.concatenate(found)), 2)
