"""Train a class-conditional teacher on images, as a checkpoint to compress.

The network learns v = sqrt(a_t) e - sqrt(1 - a_t) x_0 from x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, where a_t
is the cumulative alpha (Salimans & Ho 2022, arXiv:2202.00512), under the loss

    mean over t, e of  min(SNR_t, 5) / (SNR_t + 1) * |v - v_theta(x_t, t, label)|^2,   SNR_t = a_t / (1 - a_t)

(min-SNR-5, Hang et al. 2023, arXiv:2303.09556). One label in ten is replaced by the null label, the label after the
last class, so that the model can be sampled with classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

All random draws of step k come from a generator seeded with (seed, k). A stopped run that is resumed with --resume
therefore ends at bit-identical weights on the same machine, without saving any generator state.

    python examples/pretrain.py --images TRAIN.npz --out teacher
"""

import argparse
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from make_calib_data import load_images
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

LABEL_DROPOUT = 0.1
SNR_CLIP = 5.0
EMA_DECAY = 0.9995
GRADIENT_NORM = 1.0
STATEFUL = ("unet", "ema", "optimizer", "schedule")  # fields of Training with a state_dict
GRID_STEPS, GRID_COLUMNS, GRID_ROWS = 15, 8, 10


@dataclass(frozen=True)
class Settings:
    """Settings that determine the result. They are saved in the checkpoint, and resuming requires the same settings."""

    steps: int
    batch: int
    lr: float
    seed: int
    images_sha256: str


@dataclass
class Training:
    """State that a training step changes."""

    unet: UNet2DModel
    ema: EMAModel
    optimizer: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.LambdaLR
    step: int = 0

    def state(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in STATEFUL} | {"step": self.step}

    def load_(self, state: dict) -> None:
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


def build_unet(shape: tuple[int, int, int], classes: int | None) -> UNet2DModel:
    """Build the teacher's architecture for images [C, H, W]; the last class embedding is the null label."""
    channels, height, width = shape
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=None if classes is None else classes + 1,
    )


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def build_training(unet: UNet2DModel, settings: Settings) -> Training:
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings.lr)
    warmup = min(200, settings.steps // 10)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, settings.steps)
    # EMAModel has a warm-up: the decay of step k is min((1 + k) / (10 + k), EMA_DECAY).
    ema = EMAModel(unet.parameters(), decay=EMA_DECAY, foreach=True)
    return Training(unet, ema, optimizer, schedule)


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


def indices(step: int, count: int, batch: int, seed: int) -> np.ndarray:
    """Return the image indices of a step: batches of one permutation per epoch, without an incomplete last batch."""
    epoch, position = divmod(step, count // batch)
    order = np.random.default_rng([seed, 0, epoch]).permutation(count)
    return order[position * batch : (position + 1) * batch]


def loss_of_step(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    x: np.ndarray,
    y: np.ndarray | None,
    step: int,
    settings: Settings,
) -> Tensor:
    """Compute the weighted v loss on the images, labels, timesteps and noise that (seed, step) determines."""
    rng = np.random.default_rng([settings.seed, 1, step])
    picked = indices(step, len(x), settings.batch, settings.seed)
    device = unet.device

    clean = torch.from_numpy(x[picked]).to(device).float() / 127.5 - 1.0
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(device)
    t = torch.from_numpy(rng.integers(0, scheduler.config.num_train_timesteps, len(picked))).to(device)
    labels = None
    if y is not None:
        null = unet.config.num_class_embeds - 1
        dropped = rng.random(len(picked)) < LABEL_DROPOUT
        labels = torch.from_numpy(np.where(dropped, null, y[picked])).to(device)

    noisy = scheduler.add_noise(clean, noise, t)
    target = scheduler.get_velocity(clean, noise, t)
    with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
        v = unet(noisy, t, class_labels=labels).sample
    error = (v.float() - target).square().mean(dim=(1, 2, 3))
    snr = compute_snr(scheduler, t)
    return (snr.clamp(max=SNR_CLIP) / (snr + 1) * error).mean()


def train_step_(
    training: Training, scheduler: DDPMScheduler, x: np.ndarray, y: np.ndarray | None, settings: Settings
) -> Tensor:
    loss = loss_of_step(training.unet, scheduler, x, y, training.step, settings)
    training.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(training.unet.parameters(), GRADIENT_NORM)
    training.optimizer.step()
    training.schedule.step()
    training.ema.step(training.unet.parameters())
    training.step += 1
    return loss.detach()


def save_state(training: Training, settings: Settings, path: Path) -> None:
    """Write to a temporary file, flush and rename, so that `path` is always a complete checkpoint."""
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        torch.save(training.state() | {"settings": asdict(settings)}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_state_(training: Training, settings: Settings, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state.pop("settings")
        wrong = [name for name, value in asdict(settings).items() if before[name] != value]
        if not wrong:
            training.load_(state)
            training.ema.to(training.unet.device)
    except Exception as error:  # torch.load raises many types for damaged files
        raise SystemExit(f"{path}: not a checkpoint of this script: {error}") from error
    if wrong:
        changed = ", ".join(f"{name} {before[name]}, now {getattr(settings, name)}" for name in wrong)
        raise SystemExit(f"{path}: made with other settings ({changed}); use the same settings or another --out")


@contextmanager
def averaged_weights(training: Training) -> Iterator[UNet2DModel]:
    """Use the EMA weights inside the block and restore the network's own weights afterwards."""
    training.ema.store(training.unet.parameters())
    training.ema.copy_to(training.unet.parameters())
    try:
        yield training.unet
    finally:
        training.ema.restore(training.unet.parameters())


@torch.no_grad()
def save_grid(unet: UNet2DModel, scheduler: DDPMScheduler, path: Path) -> None:
    """Sample one row per class, without guidance and always from the same noise, and write a PNG."""
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
    solver.set_timesteps(GRID_STEPS)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    classes = unet.config.num_class_embeds
    rows = GRID_ROWS if classes is None else min(GRID_ROWS, classes - 1)
    labels = None
    if classes is not None:
        labels = torch.arange(rows, device=unet.device).repeat_interleave(GRID_COLUMNS)
    shape = (rows * GRID_COLUMNS, unet.config.in_channels, height, width)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(unet.device)
    for t in solver.timesteps:
        v = unet(sample, t, class_labels=labels).sample
        sample = solver.step(v, t, sample).prev_sample
    images = (sample.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(DDPMPipeline.numpy_to_pil(images), rows, GRID_COLUMNS).save(path)


@contextmanager
def progress(steps: int, start: int, every: int) -> Iterator:
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


def train_(
    training: Training, x: np.ndarray, y: np.ndarray | None, settings: Settings, args: argparse.Namespace
) -> None:
    """Train up to --stop-at or --steps, writing checkpoints and sample grids."""
    scheduler, state_path = build_scheduler(), args.out / "training.pt"
    last = min(settings.steps, args.stop_at or settings.steps)
    smooth = None
    with progress(settings.steps, training.step, args.log_every) as report:
        while training.step < last:
            loss = train_step_(training, scheduler, x, y, settings)
            smooth = loss if smooth is None else torch.lerp(smooth, loss, 0.02)
            report(training.step, smooth.item())
            if training.step % args.save_every == 0 or training.step == last:
                if not torch.isfinite(smooth):
                    raise SystemExit(f"loss is not finite at step {training.step}: restart with a smaller --lr")
                save_state(training, settings, state_path)
            if training.step % args.sample_every == 0 or training.step == settings.steps:
                with averaged_weights(training) as unet:
                    save_grid(unet, scheduler, args.out / "samples" / f"step_{training.step:06d}.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a class-conditional diffusion teacher from images.")
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="npz with x uint8 [N,H,W] or [N,H,W,C] and, optionally, y [N]",
    )
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder; training.pt is the checkpoint")
    parser.add_argument("--steps", type=int, default=5255)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --out, if any")
    parser.add_argument("--stop-at", type=int, help="stop early at this step, to resume later")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--sample-every", type=int, default=1000, help="steps between sample grids")
    parser.add_argument("--log-every", type=int, default=50, help="steps between log lines without a terminal")
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "stop_at", "save_every", "sample_every", "log_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1")
    if args.lr <= 0 or args.seed < 0:
        raise SystemExit("--lr must be above 0 and --seed must not be negative")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    x, y = load_images(args.images)
    if x.shape[2] % 4 or x.shape[3] % 4:
        size = f"{x.shape[2]} x {x.shape[3]}"
        raise SystemExit(f"{args.images}: height and width must be multiples of 4, found {size}")
    if args.batch > len(x):
        raise SystemExit(f"--batch {args.batch} is more than the {len(x)} images of {args.images}")
    state_path = args.out / "training.pt"
    if state_path.exists() and not args.resume:
        raise SystemExit(f"{state_path} exists: pass --resume to resume from it, or use another --out")
    device = pick_device(args.device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {args.out}: cannot be created: {error}") from error

    digest = hashlib.sha256(x.tobytes() + (b"" if y is None else y.tobytes())).hexdigest()
    settings = Settings(args.steps, args.batch, args.lr, args.seed, digest)
    torch.manual_seed(args.seed)
    unet = build_unet(x.shape[1:], None if y is None else int(y.max()) + 1).to(device)
    training = build_training(unet, settings)
    if state_path.exists():
        load_state_(training, settings, state_path)
        print(f"resuming at step {training.step} of {args.steps}")

    try:
        train_(training, x, y, settings, args)
    except KeyboardInterrupt:
        print(f"interrupted at step {training.step}; --resume continues from the last checkpoint")
        raise SystemExit(130) from None
    if training.step < args.steps:
        print(f"stopped at step {training.step} of {args.steps}; --resume continues")
        return
    with averaged_weights(training) as unet:
        DDPMPipeline(unet, build_scheduler()).save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
