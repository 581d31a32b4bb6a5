"""The training loop shared by all training stages.

    for step in steps:   loss(student, *draw(generator of this batch, step / steps))   ->  AdamW  ->  EMA

`accelerate` places the model and averages gradients over processes, so `accelerate launch` runs the loop unchanged.
The gradients of a step are averaged over `accumulate` batches of each process. Batch
k = (step * accumulate + i) * processes + process is drawn from a generator seeded by (seed, k): a killed run resumes
from its last save and ends bit-identical to an uninterrupted run with the same number of processes.

The result is the EMA weights. Every training starts a new average, whose decay 1 - (1 + step)^(-3/4) grows from 0 to
`ema`: the weights that the training started from, as those of a network just pruned, do not remain in it.

Random numbers are drawn on the CPU and moved to the device by the loop. A step computes on the device only and does not
synchronize with it, so that its loss and gradients can be replayed as one CUDA graph (cuda_graph.py).
"""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, send_to_device
from diffusers.training_utils import EMAModel
from torch import nn

from diffpress.compress.progress import progress
from diffpress.compress.training.cuda_graph import CapturedStep, refuse_cuda_graph
from diffpress.compress.training.loss_log import LossLog
from diffpress.compress.training.resume import read_state, write_state
from diffpress.runtime.errors import DiffpressError, MissingDependencyError

GRADIENT_CLIP = 1.0
STUDENT_PREFIXES = ("", "generator.", "base.")  # of its names in the module that is trained
STATE = "training.safetensors"


class Objective(NamedTuple):
    """What a training minimizes.

    Attributes:
        draw: `draw(generator, completed fraction of the training)` returns all random values and data of a batch:
            tensors and lists and dicts of tensors, which the loop moves to the device, and plain values.
        loss: `loss(model, *chosen, *drawn)` returns a scalar tensor, computed on the device of its arguments.
        choose: `choose(generator)` returns what all batches of a step in all processes have in common, as which of
            several networks is trained.
    """

    draw: Callable[[torch.Generator, float], tuple[Any, ...]]
    loss: Callable[..., torch.Tensor]
    choose: Callable[[torch.Generator], tuple[Any, ...]] = lambda generator: ()


@dataclass(frozen=True)
class Training:
    """Settings of one training.

    Attributes:
        steps: Number of optimizer steps.
        learning_rate: Peak learning rate.
        warmup: Steps of linear warm-up.
        ema: Final decay of the moving average of the weights.
        seed: Seed of the batches.
        save_every: Steps between two saves of the training state.
        work: Folder of the training state.
        what: Name of the training in progress and error messages.
        precision: fp32, or bf16 to compute the loss under autocast.
        accumulate: Batches per optimizer step in each process.
        cuda_graphs: Replay steps as CUDA graphs on a GPU; a graph holds one batch, so `accumulate` must be 1.
        partial: Allow steps that leave some parameters without a gradient.
        logs: Folder of the losses, TensorBoard logs and previews.
        tensorboard: Log the loss for TensorBoard.
        preview_every: Steps between two previews; 0 for none.
        preview: `preview(model with the EMA weights, file)` writes a preview image.
        sparse_layers: Layers of the model whose weights that are zero stay zero.
    """

    steps: int
    learning_rate: float
    warmup: int
    ema: float
    seed: int
    save_every: int
    work: Path
    what: str
    precision: str = "fp32"
    accumulate: int = 1
    cuda_graphs: bool = False
    partial: bool = False
    logs: Path | None = None
    tensorboard: bool = False
    preview_every: int = 0
    preview: Callable[[nn.Module, Path], None] | None = None
    sparse_layers: tuple[str, ...] = ()


class TrainingDivergedError(DiffpressError):
    """The loss became NaN or infinite; the last saved state is kept."""


def train(student: nn.Module, objective: Objective, run: Training) -> nn.Module:
    """Train `student` in place and load the EMA weights into it at the end; resume from `run.work`.

    Raises:
        InvalidInputError: `run.cuda_graphs` is set and the steps cannot be captured.
        MissingDependencyError: `run.tensorboard` is set and tensorboard is not installed.
        TrainingDivergedError: The loss is NaN or infinite.
    """
    accelerator = _accelerator(run)
    if run.cuda_graphs:
        refuse_cuda_graph(student, run.what)
    optimizer = torch.optim.AdamW(student.parameters(), lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    # foreach: one kernel for many tensors, since small networks are bound by launch overhead
    ema = EMAModel(student.parameters(), decay=run.ema, min_decay=0.0, use_ema_warmup=True, power=3 / 4, foreach=True)
    start = _restore_(student, optimizer, ema, run)
    with warnings.catch_warnings():
        # torch has renamed the broadcast_buffers argument that accelerate passes
        warnings.simplefilter("ignore", FutureWarning)
        model, optimizer = accelerator.prepare(student.train(), optimizer)
    ema.to(accelerator.device)
    device = accelerator.device
    zeros = _zeros(accelerator.unwrap_model(model), run.sparse_layers)
    loss_log = LossLog(run.logs if accelerator.is_main_process else None, start)

    def gradients_of(*drawn: Any) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss = objective.loss(model, *drawn)
        accelerator.backward(loss)
        return loss.detach()

    step_of = CapturedStep(gradients_of, model) if run.cuda_graphs and device.type == "cuda" else gradients_of
    with progress(run.what, run.steps, start) as advance:
        for step in range(start, run.steps):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate * learning_rate_factor(step, run.steps, run.warmup)
            # indices below 0 are those of no batch
            chosen = objective.choose(step_generator(run.seed, -1 - step))
            optimizer.zero_grad()
            losses = []
            for i in range(run.accumulate):
                batch = (step * run.accumulate + i) * accelerator.num_processes + accelerator.process_index
                torch.manual_seed(batch)  # makes dropout repeat when a run resumes
                drawn = objective.draw(step_generator(run.seed, batch), step / run.steps)
                # the processes average their gradients once a step
                with accelerator.no_sync(model) if i + 1 < run.accumulate else nullcontext():
                    losses.append(step_of(*send_to_device((*chosen, *drawn), device)))
            loss = torch.stack(losses).mean()
            value = accelerator.reduce(loss, reduction="mean").item()  # a NaN in one process stops all
            if not math.isfinite(value):
                raise TrainingDivergedError(
                    f"{run.what}: the loss is {value} at step {step} of {run.steps}; lower learning_rate "
                    f"(now {run.learning_rate:g}). The last saved state is kept in {run.work}"
                )
            accelerator.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
            optimizer.step()
            for weight, zero in zeros:
                weight.detach().masked_fill_(zero, 0.0)
            ema.step(model.parameters())
            advance(step + 1, f"loss {value:.4f}")
            loss_log.add(step + 1, value)
            if run.tensorboard:
                accelerator.log({"loss": value}, step=step + 1)
            if not accelerator.is_main_process:
                continue
            if run.preview_every and (step + 1) % run.preview_every == 0:
                _preview(accelerator.unwrap_model(model), ema, step + 1, run)
            if (step + 1) % run.save_every == 0 and step + 1 < run.steps:
                loss_log.write()
                _save(accelerator.unwrap_model(model), optimizer, ema, step + 1, run)
    loss_log.write()
    for tracker in accelerator.trackers:
        tracker.finish()
    student = accelerator.unwrap_model(model).to("cpu")
    # accelerate does not move a model with this mark, so a copy would stay on the CPU in the next training
    vars(student).pop("_is_accelerate_prepared", None)
    ema.to("cpu")
    ema.copy_to(student.parameters())
    return student.eval()


def _zeros(model: nn.Module, layers: tuple[str, ...]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Return the trained weights of the named layers, of the model or of the one inside it, and where they are zero."""
    sparse = {f"{prefix}{layer}.weight" for prefix in STUDENT_PREFIXES for layer in layers}
    return [(weight, weight.detach() == 0) for name, weight in model.named_parameters() if name in sparse]


def _accelerator(run: Training) -> Accelerator:
    """Return the accelerator that places the model, with a TensorBoard tracker if `run` asks for one."""
    # buffers are constant tables; broadcasting them in every forward pass would break a second pass before backward
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=run.partial, broadcast_buffers=False)]
    # the recipe sets the precision and the accumulation, not the launcher
    accumulation = GradientAccumulationPlugin(num_steps=run.accumulate)  # by which `backward` divides the loss
    settings: dict[str, Any] = {"kwargs_handlers": handlers, "mixed_precision": "no"}
    settings["gradient_accumulation_plugin"] = accumulation
    if not run.tensorboard:
        return Accelerator(**settings)
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingDependencyError("tensorboard", "tensorboard", f"{run.what}: 'tensorboard: true'")
    accelerator = Accelerator(**settings, log_with="tensorboard", project_dir=run.logs)
    accelerator.init_trackers(run.what.replace(" ", "-"))
    return accelerator


def _preview(model: nn.Module, ema: EMAModel, step: int, run: Training) -> None:
    """Draw a preview with the EMA weights and restore the weights in training."""
    if run.preview is None or run.logs is None:
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    run.preview(model, run.logs / f"step-{step:06d}.png")
    ema.restore(model.parameters())


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return the learning-rate factor of a step: linear warm-up, then half a cosine down to zero."""
    ramp = min(1.0, (step + 1) / max(warmup, 1))
    return ramp * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def step_generator(seed: int, index: int) -> torch.Generator:
    """Return the random generator of batch `index`, or of step -1 - `index` if it is negative."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


# --- resuming: tensors in a safetensors file, settings as its metadata, written atomically ----------------------


def _save(model: nn.Module, optimizer: Any, ema: EMAModel, step: int, run: Training) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{i}": value for i, value in enumerate(ema.shadow_params)}
    for i, parameter in enumerate(model.parameters()):
        for name, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{i}.{name}"] = value
    metadata = {"step": str(step), "ema_step": str(ema.optimization_step), "run": _fingerprint(run)}
    write_state(run.work / STATE, tensors, metadata, "training state")


def _restore_(model: nn.Module, optimizer: Any, ema: EMAModel, run: Training) -> int:
    saved = read_state(run.work / STATE, "training state")
    if saved is None:
        return 0
    tensors, metadata = saved
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
    settings = [run.steps, run.learning_rate, run.warmup, run.ema, run.seed, run.precision]
    return json.dumps(settings + [run.accumulate] * (run.accumulate > 1))
