"""Train a class-conditional teacher on images, as a checkpoint to compress.

The network learns v = sqrt(a_t) e - sqrt(1 - a_t) x_0 from x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, where a_t
is the cumulative alpha (Salimans & Ho 2022, arXiv:2202.00512), under the mean over t and e of |v - v_theta(x_t, t,
label)|^2. One label in ten is replaced by the null label, the label after the last class, so that the model can be
sampled with classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

Runs are resumable (training.py). --init starts from the weights of another teacher.

    python examples/pretrain.py --images TRAIN.npz --out teacher
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.utils import make_image_grid
from make_calib_data import load_images
from torch import Tensor
from training import (
    add_options,
    autocast,
    averaged_weights,
    check_options,
    load_or_build,
    pick_device,
    prepare_folder,
    train,
)

LABEL_DROPOUT = 0.1
GRID_STEPS, GRID_COLUMNS, GRID_ROWS = 15, 8, 10


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
    args: argparse.Namespace,
) -> Tensor:
    """Compute the v loss on the images, labels, timesteps and noise that (seed, step) determines."""
    rng = np.random.default_rng([args.seed, 1, step])
    picked = indices(step, len(x), args.batch, args.seed)
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
    with autocast(device):
        v = unet(noisy, t, class_labels=labels).sample
    return F.mse_loss(v.float(), scheduler.get_velocity(clean, noise, t))


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a class-conditional diffusion teacher from images.")
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="npz with x uint8 [N,H,W] or [N,H,W,C] and, optionally, y [N]",
    )
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder; training.pt is the checkpoint")
    add_options(parser, steps=40000, batch=64, lr=8e-4)
    args = parser.parse_args(argv)
    check_options(args)
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
    device = pick_device(args.device)
    prepare_folder(state_path, args)

    digest = hashlib.sha256(x.tobytes() + (b"" if y is None else y.tobytes())).hexdigest()
    torch.manual_seed(args.seed)
    classes = None if y is None else int(y.max()) + 1
    unet = load_or_build(args.init, "unet", UNet2DModel, lambda: build_unet(x.shape[1:], classes)).to(device)
    scheduler = build_scheduler()
    training = train(
        unet,
        lambda step: loss_of_step(unet, scheduler, x, y, step, args),
        lambda averaged, path: save_grid(averaged, scheduler, path),
        digest,
        state_path,
        args,
    )
    if training.step == args.steps:
        with averaged_weights(training) as averaged:
            DDPMPipeline(averaged, scheduler).save_pretrained(args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
