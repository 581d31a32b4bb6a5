"""Quantization-aware training (QAT): train the weights through the quantizers, towards the full-precision model.

Training goes through modelopt's fake quantizers q and starts from the scales of post-training quantization. With o the
outputs, e the block energies, w the weights of the quantized student and w_0 those of the full-precision model,

    L = |o(q(w)) - o(w_0)|^2  +  w_feat mean_b |e_s^b - e_t^b|^2 / |e_t^b|^2        (block_features.py)
    dq(x)/dx = 1 where |x| <= amax, else 0                (the straight-through estimator, Bengio et al. 2013)

Inputs are states of the full-precision model's own trajectory, recorded with its outputs and energies
(trajectory_dataset.py), so that it is not evaluated during training. Activation scales and smoothing
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

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.block_features import capture_features, energy_distance
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.algorithms.qat_updates import Full, LowRank, weight_scalings, weights_of
from diffpress.compress.quantization.config import QATConfig
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.trajectory_dataset import States, TrajectoryDataset
from diffpress.compress.training.loop import Objective, Training, train
from diffpress.compress.training.losses import Tensors

logger = logging.getLogger(__name__)

CHECKED_STATES = 32


def qat(quantized: Checkpoint, dataset: TrajectoryDataset, config: QATConfig, batch: int, ctx: Context) -> Checkpoint:
    """Return the `quantized` checkpoint with trained weights and their scales.

    Args:
        quantized: The checkpoint, with scales from post-training quantization.
        dataset: Trajectories of its float model, with outputs and energy maps.
        config: Settings of the training.
        batch: States per batch in each process.
        ctx: Seed and folder of the stage.
    """
    scales = quantized.quantization
    assert scales is not None
    device = Accelerator(mixed_precision="no").device
    student = fake_quantized(quantized.evolve(model=quantized.clone_model().float()))
    checked = dataset.draw(CHECKED_STATES, torch.Generator().manual_seed(0), config.trajectories)
    before = _sqnr_db(student.to(device), checked)
    run = Training(
        config.steps,
        config.learning_rate,
        config.warmup,
        config.ema,
        ctx.seed,
        config.save_every,
        ctx.work,
        "qat",
        accumulate=config.accumulate,
        logs=ctx.logs,
        sparse_layers=quantized.sparse_layers,
    )
    scaling = weight_scalings(student, scales)
    trainee: Full | LowRank = (
        LowRank(student, scaling, config.rank, torch.Generator().manual_seed(ctx.seed))
        if config.updates == "low_rank"
        else Full(student.to("cpu"), scaling)
    )
    train(trainee, _objective(dataset, config, batch), run)
    student = trainee.merged()
    after = _sqnr_db(student.to(device), checked)
    logger.info(f"output SQNR against the float model: {before:.1f} dB before training, {after:.1f} dB after")
    if not after > before:
        logger.info("training did not improve the output SQNR: lower qat.learning_rate, or remove qat")
    trained, model = student.to("cpu").state_dict(), quantized.clone_model()
    model.load_state_dict({name: trained[name] for name in model.state_dict()})  # without the quantizers' buffers
    amax = {f"{name}.weight": scaling[name].amax(weight) for name, weight in weights_of(model, scaling).items()}
    return quantized.evolve(model=model, quantization=replace(scales, amax=scales.amax | amax))


def _sqnr_db(model: nn.Module, states: States) -> float:
    """Return the SQNR of the model's outputs on these states against the float model's."""
    device = next(model.parameters()).device
    with torch.no_grad():
        out = adapter_for(model).forward(model.eval(), {name: x.to(device) for name, x in states.inputs.items()})
    return sqnr_db(states.outputs.numpy(), out.cpu().numpy())


def _objective(dataset: TrajectoryDataset, config: QATConfig, batch: int) -> Objective:
    def draw(generator: torch.Generator, share: float) -> States:
        return dataset.draw(batch, generator, config.trajectories)

    def loss(student: nn.Module, inputs: Tensors, outputs: torch.Tensor, energies: Tensors) -> torch.Tensor:
        trainee: Any = getattr(student, "module", student)  # unwrap DDP
        with capture_features(trainee.base, list(energies)) as features:
            out = student(inputs)
        output_loss = torch.mean((out - outputs) ** 2)
        return output_loss + config.feature_weight * energy_distance(features, energies) if energies else output_loss

    return Objective(draw, loss)
