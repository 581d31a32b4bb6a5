"""Train the small network whose features score generated images, and write it as one ONNX file.

A Fréchet distance needs a feature space in which similar images are close. For 28 x 28 grayscale images this is the
layer before the logits of a classifier, here a residual network:

    x [B, 1, 28, 28] in [-1, 1] -> 28 x 28 x 32 -> 14 x 14 x 32 -> 7 x 7 x 64 -> mean -> features [B, 64]
                                                                 features -> linear -> logits [B, 10]

The features are the spatial mean of the last ReLU's output. The network is used for *scoring* only: no student may be
trained, selected or calibrated on it, because an optimised score no longer measures quality. What selects students (a
search, the bounds of quantization) uses a second network, of other widths and another seed:

    python examples/train_features.py --images TRAIN.npz --test TEST.npz --out features.onnx
    python examples/train_features.py --images SOME.npz --test OTHERS.npz --out selection_features.onnx \
        --widths 16 16 40 --epochs 60 --seed 1
"""

import argparse
import io
import time
import warnings
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from make_calib_data import extract, load_grey
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

OPSET = 18
CLASSES = 10
WIDTHS = (32, 32, 64)  # channels at 28 x 28, 14 x 14 and 7 x 7 pixels
PAD = 2  # maximum shift of the crop augmentation in pixels, about 7 % of the side


def to_unit_range(x: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 [-1, 1], the data range of the denoiser."""
    return x.float() / 127.5 - 1.0


class ConvNorm(nn.Module):
    """A 3 x 3 convolution with BatchNorm; `fold_` merges the two for inference."""

    def __init__(self, in_width: int, out_width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fold_(self) -> None:
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()


class Residual(nn.Module):
    """Residual block relu(x + conv(relu(conv(x)))), each convolution followed by BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = ConvNorm(width, width)
        self.second = ConvNorm(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class FeatureNet(nn.Module):
    """Classifier from sample [B, 1, 28, 28] to (features [B, D], logits [B, 10]); D is the last of the widths."""

    def __init__(self, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        first, second, third = widths
        self.body = nn.Sequential(
            ConvNorm(1, first), nn.ReLU(),
            ConvNorm(first, second, stride=2), nn.ReLU(), Residual(second),
            ConvNorm(second, third, stride=2), nn.ReLU(), Residual(third),
        )  # fmt: skip
        self.head = nn.Linear(third, CLASSES)

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(sample).mean(dim=(2, 3))
        return features, self.head(features)


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Shift each image of [B, C, H, W] by up to PAD pixels and mirror half of the images."""
    batch, _, height, width = x.shape
    padded = F.pad(x, (PAD, PAD, PAD, PAD), value=-1.0)  # -1 is the black background
    top, left = torch.randint(0, 2 * PAD + 1, (2, batch, 1), generator=rng)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirror = torch.rand(batch, 1, generator=rng) < 0.5
    columns = torch.where(mirror, columns.flip(1), columns)
    picked = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)  # advanced indexing moves the channel to the end


def train(
    x: Tensor, y: Tensor, epochs: int, batch: int, lr: float, seed: int, widths: tuple[int, int, int] = WIDTHS
) -> FeatureNet:
    """Train with SGD, Nesterov momentum and a one-cycle schedule; print one line per epoch."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    net = FeatureNet(widths).to(memory_format=torch.channels_last)
    steps = len(x) // batch
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    started = time.perf_counter()
    for epoch in range(epochs):
        net.train()
        total, right = 0.0, 0
        for picked in torch.randperm(len(x), generator=rng)[: steps * batch].view(steps, batch):
            images = augment(to_unit_range(x[picked]), rng).contiguous(memory_format=torch.channels_last)
            logits = net(images)[1]
            loss = F.cross_entropy(logits, y[picked], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            right += int((logits.argmax(1) == y[picked]).sum())
        seconds = time.perf_counter() - started
        figures = f"loss {total / steps:.4f}  train accuracy {right / (steps * batch):.4f}"
        print(f"epoch {epoch + 1}/{epochs}  {figures}  {seconds:.0f} s", flush=True)
    return net


def exported(net: nn.Module, inputs: dict[str, Tensor], outputs: tuple[str, ...]) -> onnx.ModelProto:
    """Fold each BatchNorm into its convolution and export; the first dimension of each input is dynamic."""
    net = net.eval().to(memory_format=torch.contiguous_format)
    for module in net.modules():
        if isinstance(module, ConvNorm):
            module.fold_()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        torch.onnx.export(
            net,
            tuple(inputs.values()),
            buffer,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: torch.export.Dim(f"batch_{number}")} for number in range(len(inputs))),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    # The exporter records the source line of every node, including local paths.
    del model.metadata_props[:], model.graph.metadata_props[:]
    for item in [*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info]:
        del item.metadata_props[:]
        item.doc_string = ""
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the feature network that scores generated images.")
    parser.add_argument("--images", type=Path, required=True, help="npz with x uint8 [N, 28, 28] and y [N]")
    parser.add_argument("--test", type=Path, required=True, help="npz with the held-out images")
    parser.add_argument("--out", type=Path, required=True, help="the ONNX file to write")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--widths", type=int, nargs=3, default=WIDTHS, help="channels at 28, 14 and 7 pixels")
    args = parser.parse_args(argv)
    x, y = load_grey(args.images)
    test_x, test_y = load_grey(args.test)
    if not 1 <= args.batch <= len(x) or args.epochs < 1:
        raise SystemExit(f"--batch must be 1..{len(x)} and --epochs at least 1")
    if not args.out.parent.is_dir():
        raise SystemExit(f"--out {args.out}: the folder {args.out.parent} does not exist")

    net = train(
        torch.from_numpy(x), torch.from_numpy(y), args.epochs, args.batch, args.lr, args.seed, tuple(args.widths)
    )
    model = exported(net, {"sample": torch.zeros(2, 1, 28, 28)}, ("features", "logits"))
    args.out.write_bytes(model.SerializeToString(deterministic=True))
    print(f"wrote {args.out} ({args.out.stat().st_size:,} bytes)")
    _, recognised = extract(args.out, test_x)
    print(f"test accuracy {(recognised == test_y).mean():.4f} on {len(test_x):,} held-out images")


if __name__ == "__main__":
    main()
