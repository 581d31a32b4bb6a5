"""Resumable training on one device, shared by the scripts that pretrain teachers.

A script gives `train` a model and a function that computes the loss of step k. All random draws of step k must come
from a generator seeded with (seed, k): a stopped run that is resumed then ends at bit-identical weights on the same
machine, without saving any generator state.

The learning rate is constant after a warm-up and falls to zero over the last part of the run, so that --steps may
change when a run is resumed before that part.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

EMA_DECAY = 0.9995  # of step k: min((1 + k) / (10 + k), EMA_DECAY)
WARMUP, COOLDOWN = 200, 0.2  # steps; fraction of all steps
GRADIENT_NORM = 1.0
STATEFUL = ("model", "ema", "optimizer", "schedule")  # fields of Training with a state_dict


@dataclass
class Training:
    """State that a training step changes."""

    model: nn.Module
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0

    def state(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in STATEFUL} | {"step": self.step}

    def load_(self, state: dict) -> None:
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the factor of the peak learning rate: a warm-up, then 1, then a linear fall over the last COOLDOWN."""
    return min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / (COOLDOWN * steps)))


def build_training(model: nn.Module, lr: float, steps: int) -> Training:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    return Training(model, EMAModel(model.parameters(), decay=EMA_DECAY, foreach=True), optimizer, schedule)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise SystemExit(f"--device {name}: not usable on this machine: {error}") from error
    return device


@lru_cache
def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 in hardware; otherwise autocast would only slow training down."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bf16 where the device multiplies it in hardware."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))


def save_state(training: Training, settings: dict, path: Path) -> None:
    """Write to a temporary file, flush and rename, so that `path` is always a complete checkpoint."""
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        torch.save(training.state() | {"settings": settings}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_state_(training: Training, settings: dict, path: Path) -> None:
    """Restore a state that was saved with the same settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state.pop("settings")
        wrong = [name for name, value in settings.items() if before[name] != value]
        if not wrong:
            training.load_(state)
            training.ema.to(next(training.model.parameters()).device)
    except Exception as error:  # torch.load raises many types for damaged files
        raise SystemExit(f"{path}: not a checkpoint of this script: {error}") from error
    if wrong:
        changed = ", ".join(f"{name} {before[name]}, now {settings[name]}" for name in wrong)
        raise SystemExit(f"{path}: made with other settings ({changed}); use the same settings or another --out")


@contextmanager
def averaged_weights(training: Training) -> Iterator[nn.Module]:
    """Use the EMA weights inside the block and restore the network's own weights afterwards."""
    training.ema.store(training.model.parameters())
    training.ema.copy_to(training.model.parameters())
    try:
        yield training.model
    finally:
        training.ema.restore(training.model.parameters())


@contextmanager
def progress(steps: int, start: int, every: int) -> Iterator[Callable[[int, float], None]]:
    """Show a progress bar with loss and time left on a terminal, otherwise print a line every `every` steps."""
    console = Console()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=steps, completed=start, loss="-")

        def report(step: int, loss: float) -> None:
            bar.update(task, completed=step, loss=f"{loss:.4f}")
            left = bar.tasks[0].time_remaining
            if not console.is_terminal and (step % every == 0 or step == steps):
                eta = "-" if left is None else f"{left:.0f} s"
                print(f"step {step}/{steps}  loss {loss:.4f}  left {eta}", flush=True)

        yield report


def train_step_(training: Training, loss: Tensor) -> Tensor:
    training.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), GRADIENT_NORM)
    training.optimizer.step()
    training.schedule.step()
    training.ema.step(training.model.parameters())
    training.step += 1
    return loss.detach()


def train(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    on_sample: Callable[[nn.Module, Path], None],
    data_sha256: str,
    state_path: Path,
    args: argparse.Namespace,
    averaged: bool = True,
) -> Training:
    """Train up to --stop-at, --steps or --minutes, from the checkpoint at `state_path` if there is one.

    Args:
        model: What is trained, on its device.
        loss_of_step: Computes the loss of step k.
        on_sample: Called every --sample-every steps and at the end, with the model under its EMA weights and the path
            of an image grid; it also saves what the script makes.
        data_sha256: Hash of the training set; resuming requires the same one.
        state_path: Where checkpoints are written.
        args: Options of `add_options`.
        averaged: Whether `on_sample` sees the EMA weights; otherwise the last ones.

    Raises:
        SystemExit: The checkpoint does not fit, the loss is not finite (1), or the run was interrupted (130).
    """
    settings = {"batch": args.batch, "lr": args.lr, "seed": args.seed, "data_sha256": data_sha256}
    training = build_training(model, args.lr, args.steps)
    if state_path.exists():
        load_state_(training, settings, state_path)
        print(f"resuming at step {training.step} of {args.steps}", flush=True)
    if training.step > args.steps:
        raise SystemExit(f"--steps {args.steps}: {state_path} is at step {training.step} already")

    def sample() -> None:
        path = state_path.parent / "samples" / f"{state_path.stem}_{training.step:06d}.png"
        with averaged_weights(training) if averaged else nullcontext(model) as current:
            on_sample(current, path)

    try:
        _train_(training, loss_of_step, sample, settings, state_path, args)
    except KeyboardInterrupt:
        print(f"interrupted at step {training.step}; --resume continues from the last checkpoint")
        raise SystemExit(130) from None
    if training.step < args.steps:
        print(f"stopped at step {training.step} of {args.steps}; --resume continues")
    return training


def _train_(
    training: Training,
    loss_of_step: Callable[[int], Tensor],
    sample: Callable[[], None],
    settings: dict,
    state_path: Path,
    args: argparse.Namespace,
) -> None:
    last = min(args.steps, args.stop_at or args.steps)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    smooth = None
    with progress(args.steps, training.step, args.log_every) as report:
        while training.step < last:
            loss = train_step_(training, loss_of_step(training.step))
            smooth = loss if smooth is None else torch.lerp(smooth, loss, 0.02)
            report(training.step, smooth.item())
            if time.monotonic() > deadline:
                last = training.step
            if training.step % args.save_every == 0 or training.step == last:
                if not torch.isfinite(smooth):
                    raise SystemExit(f"loss is not finite at step {training.step}: restart with a smaller --lr")
                save_state(training, settings, state_path)
            if training.step % args.sample_every == 0 and training.step < last:
                sample()
    sample()  # also if a run that was killed here had no step left


def add_options(parser: argparse.ArgumentParser, steps: int, batch: int, lr: float, init: bool = True) -> None:
    """Add the options of a training run, with these defaults; --init only where a run can start from weights."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    if init:
        parser.add_argument("--init", type=Path, help="pipeline folder whose weights a new run starts from")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --out, if any")
    parser.add_argument("--stop-at", type=int, help="stop early at this step, to resume later")
    parser.add_argument("--minutes", type=float, help="stop early after this time, to resume later")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--sample-every", type=int, default=1000, help="steps between image grids")
    parser.add_argument("--log-every", type=int, default=50, help="steps between log lines without a terminal")


def check_options(args: argparse.Namespace) -> None:
    """Exit with one line if an option of `add_options` is out of range."""
    for name in ("steps", "batch", "stop_at", "save_every", "sample_every", "log_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1")
    if args.lr <= 0 or args.seed < 0:
        raise SystemExit("--lr must be above 0 and --seed must not be negative")
    if args.minutes is not None and not args.minutes > 0:
        raise SystemExit("--minutes must be above 0")


def prepare_folder(state_path: Path, args: argparse.Namespace) -> None:
    """Make the output folder --out; exit with one line if that fails, or if the options do not fit its checkpoint."""
    if state_path.exists() and not args.resume:
        raise SystemExit(f"{state_path} exists: pass --resume to resume from it, or use another --out")
    if state_path.exists() and getattr(args, "init", None) is not None:
        raise SystemExit(f"{state_path} exists: --init is for a new run; leave it out to resume")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {args.out}: cannot be created: {error}") from error


def load_or_build(folder: Path | None, component: str, kind: type, build: Callable[[], nn.Module]) -> nn.Module:
    """Load a component of the pipeline folder in fp32, or build a new one if there is no folder."""
    return build() if folder is None else load_component(folder, component, kind)


def load_component(folder: Path, component: str, kind: type) -> nn.Module:
    """Load a component of a pipeline folder in fp32; exit with one line if that fails."""
    try:
        return kind.from_pretrained(folder / component).float()
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder}: no usable {component}/: {error}") from error
