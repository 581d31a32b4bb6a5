"""Quantization-aware training: what rounding cost the model, its weights learn to give back.

Through modelopt's fake quantizers q, starting from the scales of post-training quantization, with o the outputs, e the
block energies, and w the weights of the quantized student against w_0, the full-precision model it was made from,

    L = |o(q(w)) - o(w_0)|^2  +  w_feat mean_b |e_s^b - e_t^b|^2 / |e_t^b|^2     (energies as in compress/distill.py)
    dq(x)/dx = 1 where |x| <= amax, else 0                (the straight-through estimator, Bengio et al. 2013)

Inputs are states of the model's own trajectory, as in EfficientDM (He et al. 2023): the full-precision model samples by
its own plan, under its guidance and conditions, and every call of the network is kept. No images are needed, and no
timestep is trained that sampling never visits.

Activation scales stay those of calibration. A channel's weight scale follows the weights: before every step, and once
more at the end, its amax is the channel's largest magnitude times what it was before training, 1 or `reduce_range`'s
127/64. The result is data as that of post-training quantization is: float weights beside the amax of every quantizer.
Where training ends further from the full-precision answers than it began, the run says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from compress.adapters import adapter_for
from compress.checkpoint import Checkpoint, Quantization
from compress.config import QuantizeConfig
from compress.context import Context, say
from compress.distill import captured, feature_distance
from compress.metrics import sqnr_db
from compress.progress import progress
from compress.torch_network import TorchNetwork
from compress.training import Training, train
from runtime.sampler import generate_batches

CHECKED_STATES = 32
TRAJECTORY_SEED = 3_000_000  # far from the seeds that people sample, calibrate and evaluate with

Calls = list[dict[str, np.ndarray]]
Tensors = dict[str, torch.Tensor]


def qat(
    checkpoint: Checkpoint, scales: Quantization, student: nn.Module, config: QuantizeConfig, ctx: Context
) -> Checkpoint:
    """Train `student`, a float32 copy of the float `checkpoint` with quantizers of these `scales` in place.

    Returns the checkpoint with the trained weights and their scales; of what it is given only `student` changes.
    """
    device = Accelerator().device
    teacher = checkpoint.clone_model().float().eval().to(device)
    calls = visited_states(teacher, checkpoint, config, ctx)
    before = _sqnr_db(student.to(device), teacher, calls)
    run = Training(
        config.steps, config.learning_rate, config.warmup, config.ema, ctx.seed, config.save_every, ctx.work, "qat"
    )
    proportions = _proportions(checkpoint.model, scales)
    student = train(student.to("cpu"), _loss(teacher, calls, proportions, config), run)
    follow_(student, proportions)
    after = _sqnr_db(student.to(device), teacher, calls)
    say(f"output SQNR to the float model on visited states: {before:.1f} dB before training, {after:.1f} dB after")
    if not after > before:
        say("training did not help: lower learning_rate, or take mode ptq")
    trained, model = student.to("cpu").state_dict(), checkpoint.clone_model()
    model.load_state_dict({name: trained[name] for name in model.state_dict()})  # without the quantizers' own buffers
    modules = dict(model.named_modules())
    amax = dict(scales.amax)
    for name, proportion in proportions.items():
        amax[f"{name}.weight"] = (_largest(modules[name]).float() * proportion).flatten()
    return checkpoint.evolve(model=model, quantization=Quantization(scales.format, amax))


def _sqnr_db(model: nn.Module, teacher: nn.Module, calls: Calls) -> float:
    """SQNR of the model's answers to the teacher's, on the same states whenever it is asked."""
    device = next(teacher.parameters()).device
    inputs = draw(calls, CHECKED_STATES, torch.Generator().manual_seed(0))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with torch.no_grad():
        wanted, found = (adapter_for(m).forward(m.eval(), inputs).cpu().numpy() for m in (teacher, model))
    return sqnr_db(wanted, found)


def _loss(
    teacher: nn.Module, calls: Calls, proportions: Tensors, config: QuantizeConfig
) -> Callable[[nn.Module, torch.Generator], torch.Tensor]:
    device = next(teacher.parameters()).device
    blocks = adapter_for(teacher).blocks(teacher) if config.feature_weight else []

    def loss_of(student: nn.Module, generator: torch.Generator) -> torch.Tensor:
        follow_(student, proportions)
        inputs = {name: value.to(device) for name, value in draw(calls, config.batch, generator).items()}
        with torch.no_grad(), captured(teacher, blocks) as wanted:
            answer = adapter_for(teacher).forward(teacher, inputs)
        with captured(student, blocks) as found:
            out = adapter_for(student).forward(student, inputs)
        loss = torch.mean((out - answer) ** 2)
        return loss + config.feature_weight * feature_distance(found, wanted) if blocks else loss

    return loss_of


class _Recorder(TorchNetwork):
    """A network that keeps the inputs of every call: [B, ...] by name, twice the samples under guidance."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, calls: Calls) -> None:
        super().__init__(model, checkpoint.spec)
        self._calls = calls

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self._calls.append(inputs)
        return super().run(inputs)


def visited_states(model: nn.Module, checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> Calls:
    """The inputs of every call while `model` makes `config.trajectories` samples by the checkpoint's own plan."""
    calls: Calls = []
    network, count = _Recorder(model, checkpoint, calls), config.trajectories
    seeds, told = range(TRAJECTORY_SEED, TRAJECTORY_SEED + count), ctx.conditions(count)
    with progress("trajectories", count) as advance:
        done = 0
        for samples in generate_batches(network, checkpoint.spec, seeds, batch=config.batch, conditions=told):
            done += len(samples)
            advance(done)
    return calls


def draw(calls: Calls, size: int, generator: torch.Generator) -> Tensors:
    """`size` rows [size, ...] by name, uniform over all rows of all calls."""
    ends = np.cumsum([len(next(iter(call.values()))) for call in calls])
    picks = torch.randint(0, int(ends[-1]), (size,), generator=generator).numpy()
    places = [(which := int(np.searchsorted(ends, pick, "right")), int(pick - ends[which])) for pick in picks]
    # rows are counted from a call's end: -1 is its last
    return {name: torch.from_numpy(np.stack([calls[c][name][row] for c, row in places])) for name in calls[0]}


def follow_(model: nn.Module, proportions: Tensors) -> None:
    """Give every weight quantizer of `model` the amax that belongs to the weights as they are now."""
    modules: dict[str, Any] = dict(getattr(model, "module", model).named_modules())  # under DDP the model is wrapped
    for name, proportion in proportions.items():
        largest = _largest(modules[name])
        modules[name].weight_quantizer.amax = largest * proportion.to(largest.device)


def _proportions(model: nn.Module, scales: Quantization) -> Tensors:
    """Layer -> amax over the largest magnitude of each output channel, shaped to broadcast over the weight."""
    modules = dict(model.named_modules())
    largest = {name: _largest(modules[name]).float() for name in scales.layers}
    return {name: scales.amax[f"{name}.weight"].view_as(value) / value for name, value in largest.items()}


def _largest(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.detach()
    return weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True)
