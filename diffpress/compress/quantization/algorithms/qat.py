"""Quantization-aware training: what rounding cost the model, its weights learn to give back.

Through modelopt's fake quantizers q, starting from the scales of post-training quantization, with o the outputs, e the
block energies, and w the weights of the quantized student against w_0, the full-precision model it was made from,

    L = |o(q(w)) - o(w_0)|^2  +  w_feat mean_b |e_s^b - e_t^b|^2 / |e_t^b|^2        (energies: distillation/features.py)
    dq(x)/dx = 1 where |x| <= amax, else 0                (the straight-through estimator, Bengio et al. 2013)

Inputs are states of the full-precision model's own trajectory (states.py). Activation scales and smoothing stay as
calibration found them; weight scales follow the weights, which change in full or by factors of low rank (updates.py).
The result is data as that of post-training quantization is: float weights beside the amax of every quantizer. Where
training ends further from the full-precision answers than it began, the run says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.config import QuantizeConfig
from diffpress.compress.context import Context, say
from diffpress.compress.distillation.block_features import captured, feature_distance
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.algorithms.qat_updates import Full, LowRank, scalings, weights_of
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset, draw, sample_trajectories
from diffpress.compress.training.loop import Objective, Training, train
from diffpress.compress.training.losses import Tensors

CHECKED_STATES = 32


def qat(
    checkpoint: Checkpoint, scales: Quantization, student: nn.Module, config: QuantizeConfig, ctx: Context
) -> Checkpoint:
    """Train `student`, a float32 model like the float `checkpoint` with quantizers of these `scales` in place.

    Returns the checkpoint with the trained weights and their scales; of what it is given only `student` changes.
    """
    device = Accelerator(mixed_precision="no").device
    teacher = checkpoint.clone_model().float().eval().to(device)
    calls = sample_trajectories(teacher, checkpoint, config.trajectories, config.batch, ctx)
    before = _sqnr_db(student.to(device), teacher, calls)
    run = Training(
        config.steps, config.learning_rate, config.warmup, config.ema, ctx.seed, config.save_every, ctx.work, "qat"
    )
    scaling = scalings(student, scales)
    trainee: Full | LowRank = (
        LowRank(student, scaling, config.rank, torch.Generator().manual_seed(ctx.seed))
        if config.updates == "low_rank"
        else Full(student.to("cpu"), scaling)
    )
    train(trainee, _loss(teacher, calls, config), run)
    student = trainee.merged()
    after = _sqnr_db(student.to(device), teacher, calls)
    say(f"output SQNR to the float model on visited states: {before:.1f} dB before training, {after:.1f} dB after")
    if not after > before:
        say("training did not help: lower learning_rate, or take mode ptq")
    trained, model = student.to("cpu").state_dict(), checkpoint.clone_model()
    model.load_state_dict({name: trained[name] for name in model.state_dict()})  # without the quantizers' own buffers
    amax = {f"{name}.weight": scaling[name].amax(weight) for name, weight in weights_of(model, scaling).items()}
    return checkpoint.evolve(model=model, quantization=replace(scales, amax=scales.amax | amax))


def _sqnr_db(model: nn.Module, teacher: nn.Module, calls: TrajectoryDataset) -> float:
    """SQNR of the model's answers to the teacher's, on the same states whenever it is asked."""
    device = next(teacher.parameters()).device
    inputs = draw(calls, CHECKED_STATES, torch.Generator().manual_seed(0))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with torch.no_grad():
        wanted, found = (adapter_for(m).forward(m.eval(), inputs).cpu().numpy() for m in (teacher, model))
    return sqnr_db(wanted, found)


def _loss(teacher: nn.Module, calls: TrajectoryDataset, config: QuantizeConfig) -> Objective:
    blocks = adapter_for(teacher).blocks(teacher) if config.feature_weight else []

    def loss(student: nn.Module, inputs: Tensors) -> torch.Tensor:
        with torch.no_grad(), captured(teacher, blocks) as wanted:
            answer = adapter_for(teacher).forward(teacher, inputs)
        trainee: Any = getattr(student, "module", student)  # under DDP it is wrapped
        with captured(trainee.base, blocks) as found:
            out = student(inputs)
        apart = torch.mean((out - answer) ** 2)
        return apart + config.feature_weight * feature_distance(found, wanted) if blocks else apart

    return Objective(lambda generator, share: (draw(calls, config.batch, generator),), loss)
