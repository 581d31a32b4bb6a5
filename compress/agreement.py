"""How far a checkpoint's answers have moved from the teacher's: one cheap figure after every stage.

SQNR in dB of the network's output against the teacher's on the same noised inputs, over timesteps spread from clean
to noise. It follows a model through the stages; the verdict on the images is `evaluate`'s.
"""

from __future__ import annotations

import numpy as np
import torch

from compress.checkpoint import Checkpoint
from compress.data import ImageData
from compress.losses import add_noise, forward
from compress.metrics import sqnr_db
from compress.quantize import fake_quantized

BATCH = 16
SHARES = (0.1, 0.4, 0.7, 0.95)  # of the way to pure noise


def agreement_db(checkpoint: Checkpoint, teacher: Checkpoint, data: ImageData | None) -> float:
    """SQNR of `checkpoint`'s output against `teacher`'s, in dB; quantized checkpoints answer through fake-quant."""
    spec, generator = teacher.spec, torch.Generator().manual_seed(0)
    if data is not None:
        x0, conditions = data.batch(BATCH, generator)
    else:
        x0 = torch.zeros(BATCH, *spec.sample_shape)
        labels = torch.arange(BATCH) % max(spec.conditioning.classes, 1)
        conditions = {"class_labels": labels} if spec.conditioning.kind == "class" else {}
    model, wanted, found = fake_quantized(checkpoint), [], []
    with torch.no_grad():
        for share in SHARES:
            t = torch.full((BATCH,), round(share * (len(spec.schedule) - 1)))
            x_t = add_noise(spec, x0, torch.randn(x0.shape, generator=generator), t)
            wanted.append(forward(teacher.model, spec, x_t, t, conditions).numpy())
            found.append(forward(model, spec, x_t, t, conditions).numpy())
    return round(sqnr_db(np.concatenate(wanted), np.concatenate(found)), 2)
