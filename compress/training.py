"""The one training loop that every training stage shares.

    for step in steps:   loss = loss_of(student, batch of this step)   ->  AdamW  ->  EMA

`accelerate` places the model and averages gradients over devices, so `accelerate launch` runs it unchanged. The
batch of step k is drawn from a generator seeded by (seed, k): a run that was killed goes on from its last save and
ends bit for bit as an undisturbed one. The EMA weights are the result.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from compress.progress import progress
from runtime.errors import BadInput, DiffpressError

LossOf = Callable[[nn.Module, torch.Generator], torch.Tensor]
GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class Training:
    """`ema` is the decay the moving average settles at; `save_every` is in steps."""

    steps: int
    learning_rate: float
    warmup: int
    ema: float
    seed: int
    save_every: int
    work: Path
    what: str


class TrainingDiverged(DiffpressError):
    """The loss is not a number any more; the last good state is kept."""


def train(student: nn.Module, loss_of: LossOf, run: Training) -> nn.Module:
    """Train `student` in place and load the EMA weights into it at the end; resumes from `run.work`."""
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(student.parameters(), lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMAModel(student.parameters(), decay=run.ema, min_decay=0.0, use_ema_warmup=True, power=3 / 4)
    start = _restore_(student, optimizer, ema, run)
    model, optimizer = accelerator.prepare(student.train(), optimizer)
    ema.to(accelerator.device)
    with progress(run.what, run.steps, start) as advance:
        for step in range(start, run.steps):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate * learning_rate_factor(step, run.steps, run.warmup)
            batch = step * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(batch)  # dropout too repeats when a run is resumed
            loss = loss_of(model, step_generator(run.seed, batch))
            if not math.isfinite(loss.item()):
                raise TrainingDiverged(
                    f"{run.what}: the loss is {loss.item()} at step {step} of {run.steps}; lower learning_rate "
                    f"(now {run.learning_rate:g}). The last good state is kept in {run.work}"
                )
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
            optimizer.step()
            ema.step(model.parameters())
            advance(step + 1, f"loss {loss.item():.4f}")
            if (step + 1) % run.save_every == 0 and step + 1 < run.steps and accelerator.is_main_process:
                _save(accelerator.unwrap_model(model), optimizer, ema, step + 1, run)
    student = accelerator.unwrap_model(model).to("cpu")
    ema.to("cpu")
    ema.copy_to(student.parameters())
    return student.eval()


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    ramp = min(1.0, (step + 1) / max(warmup, 1))
    return ramp * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def step_generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


# --- resuming: tensors as safetensors, numbers as JSON, put in place by one rename -----------------------------


def _save(model: nn.Module, optimizer: Any, ema: EMAModel, step: int, run: Training) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{i}": value for i, value in enumerate(ema.shadow_params)}
    for i, parameter in enumerate(model.parameters()):
        for name, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{i}.{name}"] = value
    target = run.work / "training.safetensors"
    temporary = target.with_suffix(".partial")
    metadata = {"step": str(step), "ema_step": str(ema.optimization_step), "run": _fingerprint(run)}
    try:
        run.work.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{target}: the training state cannot be saved ({reason}); make space and run again") from error


def _restore_(model: nn.Module, optimizer: Any, ema: EMAModel, run: Training) -> int:
    file = run.work / "training.safetensors"
    if not file.is_file():
        return 0
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{file}: the saved training state cannot be read ({error}); delete it to start over") from error
    if metadata.get("run") != _fingerprint(run):
        return 0
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    ema.shadow_params = [tensors[f"ema.{i}"] for i in range(len(ema.shadow_params))]
    ema.optimization_step = int(metadata["ema_step"])
    for i, parameter in enumerate(model.parameters()):
        prefix = f"optimizer.{i}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state:
            optimizer.state[parameter] = state
    return int(metadata["step"])


def _fingerprint(run: Training) -> str:
    return json.dumps([run.steps, run.learning_rate, run.warmup, run.ema, run.seed])
