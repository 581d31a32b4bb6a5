"""Train a student with the shared loop (compress/training/loop.py) and draw previews of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.config import DistillConfig
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.training.loop import Objective, Training, train
from diffpress.compress.training.resume import read_state, write_state
from diffpress.runtime.io.images import image_grid, to_uint8, write_image
from diffpress.runtime.network_inputs import dummy_conditioning
from diffpress.runtime.sampler import generate
from diffpress.runtime.spec import DenoiserSpec

PREVIEW_SAMPLES = 16


def train_student(
    checkpoint: Checkpoint,
    objective: Objective,
    config: DistillConfig,
    ctx: Context,
    phase: str = "",
    student: nn.Module | None = None,
    part: str = "",
    partial: bool = False,
) -> Any:
    """Train a student, or the module that it is a part of; return that with the EMA weights, in eval mode on the CPU.

    Args:
        checkpoint: Its model is copied for the student, and its spec's plan samples the previews.
        objective: What each step draws and minimizes.
        config: Settings of the training loop.
        ctx: Seed and folders of the stage.
        phase: Name of this training among several of one stage; a phase that was completed before is loaded, not
            trained again. Empty if the stage has a single training.
        student: Module to train instead of a copy of the checkpoint's model.
        part: Name of the student in that module; empty if it is the student.
        partial: Allow steps that leave some parameters without a gradient.
    """
    student = checkpoint.clone_model() if student is None else student
    folder = ctx.work / phase.replace(" ", "-")
    result_file = folder / "finished.safetensors"
    facts = {"run": f"{checkpoint.hash} {config.model_dump_json()} {ctx.seed}"}
    completed = read_state(result_file, "result of training") if phase else None
    if completed is not None and completed[1] == facts:
        student.load_state_dict(completed[0])
        return student.eval()
    run = Training(
        config.steps,
        config.learning_rate,
        config.warmup,
        config.ema,
        ctx.seed,
        config.save_every,
        folder,
        " ".join(filter(None, ("distill", config.kind, phase))),
        precision=config.precision,
        accumulate=config.accumulate,
        cuda_graphs=config.cuda_graphs,
        partial=partial,
        logs=None if ctx.logs is None else ctx.logs / phase.replace(" ", "-"),
        tensorboard=config.tensorboard,
        preview_every=config.preview_every,
        preview=lambda model, file: draw_samples(model.get_submodule(part), checkpoint.spec, file),
        sparse_layers=checkpoint.sparse_layers,
    )
    student = train(student, objective, run)
    if phase:
        write_state(result_file, student.state_dict(), facts, "result of training")
    return student


def draw_samples(model: nn.Module, spec: DenoiserSpec, file: Path) -> None:
    """Write an image grid of samples under the spec's plan; do nothing for samples that are not pictures."""
    if not spec.is_picture:
        return
    conditions = dummy_conditioning(spec, PREVIEW_SAMPLES)
    images = generate(
        TorchNetwork(model, spec), spec, range(PREVIEW_SAMPLES), batch=PREVIEW_SAMPLES, conditions=conditions
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_image(image_grid(to_uint8(images, spec.data_range)), file)
