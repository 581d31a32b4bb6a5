"""Quantization-aware training (QAT): train the weights through the quantizers, towards the full-precision model.

Training goes through modelopt's fake quantizers q and starts from the scales of post-training quantization. With o the
outputs, e the block energies, w the weights of the quantized student and w_0 those of the full-precision model,

    L = |o(q(w)) - o(w_0)|^2  +  w_feat mean_b |e_s^b - e_t^b|^2 / |e_t^b|^2        (energies: distillation/features.py)
    dq(x)/dx = 1 where |x| <= amax, else 0                (the straight-through estimator, Bengio et al. 2013)

Inputs are states of the full-precision model's own trajectory (trajectory_dataset.py). Activation scales and smoothing
stay as calibrated; weight scales follow the weights, which are trained in full or by low-rank factors (qat_updates.py).
As with post-training quantization, the result is float weights and the amax of every quantizer. If training did not
bring the output closer to the full-precision model's, a message says so.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.distillation.block_features import capture_features, feature_distance
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.algorithms.qat_updates import Full, LowRank, weight_scalings, weights_of
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset, draw_rows, sample_trajectories
from diffpress.compress.training.loop import Objective, Training, train
from diffpress.compress.training.losses import Tensors

logger = logging.getLogger(__name__)

CHECKED_STATES = 32


def qat(
    checkpoint: Checkpoint, scales: Quantization, student: nn.Module, config: QuantizeConfig, ctx: Context
) -> Checkpoint:
    """Train `student`, a float32 copy of the float `checkpoint`'s model with quantizers of these `scales`.

    Returns:
        The checkpoint with the trained weights and their scales. `student` is modified in place.
    """
    device = Accelerator(mixed_precision="no").device
    teacher = checkpoint.clone_model().float().eval().to(device)
    dataset = sample_trajectories(teacher, checkpoint, config.trajectories, config.batch, ctx)
    before = _sqnr_db(student.to(device), teacher, dataset)
    run = Training(
        config.steps, config.learning_rate, config.warmup, config.ema, ctx.seed, config.save_every, ctx.work, "qat"
    )
    scaling = weight_scalings(student, scales)
    trainee: Full | LowRank = (
        LowRank(student, scaling, config.rank, torch.Generator().manual_seed(ctx.seed))
        if config.updates == "low_rank"
        else Full(student.to("cpu"), scaling)
    )
    train(trainee, _loss(teacher, dataset, config), run)
    student = trainee.merged()
    after = _sqnr_db(student.to(device), teacher, dataset)
    logger.info(f"output SQNR against the float model: {before:.1f} dB before training, {after:.1f} dB after")
    if not after > before:
        logger.info("training did not improve the output SQNR: lower learning_rate, or use mode ptq")
    trained, model = student.to("cpu").state_dict(), checkpoint.clone_model()
    model.load_state_dict({name: trained[name] for name in model.state_dict()})  # without the quantizers' buffers
    amax = {f"{name}.weight": scaling[name].amax(weight) for name, weight in weights_of(model, scaling).items()}
    return checkpoint.evolve(model=model, quantization=replace(scales, amax=scales.amax | amax))


def _sqnr_db(model: nn.Module, teacher: nn.Module, dataset: TrajectoryDataset) -> float:
    """Return the SQNR of the model's outputs against the teacher's; the states are the same in every call."""
    device = next(teacher.parameters()).device
    inputs = draw_rows(dataset, CHECKED_STATES, torch.Generator().manual_seed(0))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with torch.no_grad():
        reference, found = (adapter_for(m).forward(m.eval(), inputs).cpu().numpy() for m in (teacher, model))
    return sqnr_db(reference, found)


def _loss(teacher: nn.Module, dataset: TrajectoryDataset, config: QuantizeConfig) -> Objective:
    blocks = adapter_for(teacher).blocks(teacher) if config.feature_weight else []

    def loss(student: nn.Module, inputs: Tensors) -> torch.Tensor:
        with torch.no_grad(), capture_features(teacher, blocks) as reference:
            target = adapter_for(teacher).forward(teacher, inputs)
        trainee: Any = getattr(student, "module", student)  # unwrap DDP
        with capture_features(trainee.base, blocks) as found:
            out = student(inputs)
        output_loss = torch.mean((out - target) ** 2)
        return output_loss + config.feature_weight * feature_distance(found, reference) if blocks else output_loss

    return Objective(lambda generator, share: (draw_rows(dataset, config.batch, generator),), loss)
