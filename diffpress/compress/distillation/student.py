"""One training of a student by the shared loop (compress/training/loop.py), as a distillation's settings ask for it."""

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
from diffpress.runtime.io.images import image_grid, to_uint8, write_png
from diffpress.runtime.network_inputs import dummy_conditioning
from diffpress.runtime.sampler import generate
from diffpress.runtime.spec import DenoiserSpec

PREVIEWED = 16


def trained(
    checkpoint: Checkpoint,
    objective: Objective,
    config: DistillConfig,
    ctx: Context,
    phase: str = "",
    student: nn.Module | None = None,
    partial: bool = False,
) -> Any:
    """A copy of the checkpoint's model, or `student`, after training: the EMA weights, in eval mode on the CPU.

    `phase` names one of several trainings within a stage; one that was finished before is not done again. `partial`:
    not every step uses every parameter. Previews are sampled by the plan of the checkpoint's spec.
    """
    student = checkpoint.clone_model() if student is None else student
    folder = ctx.work / phase.replace(" ", "-")
    finished = folder / "finished.safetensors"
    facts = {"run": f"{checkpoint.hash} {config.model_dump_json()} {ctx.seed}"}
    before = read_state(finished, "result of training") if phase else None
    if before is not None and before[1] == facts:
        student.load_state_dict(before[0])
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
        cuda_graphs=config.cuda_graphs,
        partial=partial,
        logs=ctx.logs / phase.replace(" ", "-"),
        tensorboard=config.tensorboard,
        preview_every=config.preview_every,
        preview=lambda model, file: draw_samples(getattr(model, "generator", model), checkpoint.spec, file),
    )
    student = train(student, objective, run)
    if phase:
        write_state(finished, student.state_dict(), facts, "result of training")
    return student


def draw_samples(model: nn.Module, spec: DenoiserSpec, file: Path) -> None:
    """Write a grid of what the model makes of the first seeds by the spec's plan; nothing for models of latents."""
    if not spec.is_pixel_space:
        return
    conditions = dummy_conditioning(spec, PREVIEWED)
    images = generate(TorchNetwork(model, spec), spec, range(PREVIEWED), batch=PREVIEWED, conditions=conditions)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_png(image_grid(to_uint8(images, spec.data_range)), file)
