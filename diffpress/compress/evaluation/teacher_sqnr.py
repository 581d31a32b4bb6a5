"""How far a checkpoint's answers have moved from the teacher's: one cheap figure after every stage.

SQNR in dB of the network's output against the teacher's on the same noised inputs, over timesteps spread from clean
to noise. It follows a model through the stages; the verdict on the images is `evaluate`'s.
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
from diffpress.compress.training.image_data import ImageData
from diffpress.compress.training.losses import add_noise, forward
from diffpress.runtime.network_inputs import SAMPLE, TIMESTEP

BATCH = 16
LARGE_BATCH = 2  # for models whose one call takes seconds
SHARES = (0.1, 0.4, 0.7, 0.95)  # of the way to pure noise


def teacher_sqnr_db(checkpoint: Checkpoint, teacher: Checkpoint, data: Data | None) -> float:
    """SQNR of `checkpoint`'s output against `teacher`'s, in dB; quantized checkpoints answer through fake-quant.

    On real images where there are some, else on noise alone under stand-in conditions: having the teacher make samples
    for this figure would cost more than the stage it judges.
    """
    spec, generator = teacher.spec, torch.Generator().manual_seed(0)
    batch = LARGE_BATCH if is_large(teacher.model) else BATCH
    if isinstance(data, ImageData):
        x0, conditions = data.batch(batch, generator)
    else:
        x0, inputs = torch.zeros(batch, *spec.sample_shape), dummy_inputs(spec, batch)
        conditions = {name: value for name, value in inputs.items() if name not in (SAMPLE, TIMESTEP)}
    model, wanted, found = fake_quantized(checkpoint), [], []
    with torch.no_grad():
        for share in SHARES:
            t = torch.full((batch,), round(share * (len(spec.schedule) - 1)))
            x_t = add_noise(spec, x0, torch.randn(x0.shape, generator=generator), t)
            wanted.append(forward(teacher.model, spec, x_t, t, conditions).numpy())
            found.append(forward(model, spec, x_t, t, conditions).numpy())
    return round(sqnr_db(np.concatenate(wanted), np.concatenate(found)), 2)
