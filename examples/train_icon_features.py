"""Train the image and text encoders that score generated icons, and write them as one ONNX file with its configs.

Like CLIP (Radford et al. 2021, arXiv:2103.00020), two encoders with one space, trained so that the cosine of an image
and its own caption is the highest of the batch, in both directions:

    pixel_values [B, 3, 64, 64] -> 32 x 32 x 32 -> 16 x 16 x 64 -> 8 x 8 x 128 -> mean, max -> image_embeds [B, 128]
    input_ids    [N, 16]        -> two transformer layers of width 128 -> last token -> text_embeds [N, 128]

Each image is also compared with all names, so that names can be retrieved. The loss is the sum of both cross entropies;
captions with the same name are not negatives.

These encoders are used for *scoring* only: nothing is trained, selected or calibrated on them.

    python examples/train_icon_features.py --icons icons.npz --out features
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from icons import COLOURS, Icons, load_icons
from pretrain_text_to_image import TOKENS, build_tokenizer, encoded_captions
from torch import Tensor, nn
from train_features import ConvNorm, Residual, exported
from training import add_options, autocast, check_options, pick_device, prepare_folder, train

EMBEDDING, WIDTH, HEADS, LAYERS = 128, 128, 4, 2
MEAN, STD = 0.5, 0.5  # pixel_values are in [-1, 1]
SHIFT, BRIGHTNESS, NOISE = 4, 0.1, 0.05  # augmentation: pixels, fraction, standard deviation
MAX_SCALE = 100.0  # of the cosines, as in CLIP


class ImageEncoder(nn.Module):
    """Residual network from pixel_values [B, 3, H, W] to embeddings [B, EMBEDDING]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(3, 32, stride=2), nn.ReLU(), Residual(32),
            ConvNorm(32, 64, stride=2), nn.ReLU(), Residual(64),
            ConvNorm(64, 128, stride=2), nn.ReLU(), Residual(128),
        )  # fmt: skip
        self.head = nn.Linear(2 * 128, EMBEDDING)

    def forward(self, pixel_values: Tensor) -> Tensor:
        maps = self.body(pixel_values)
        return self.head(torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1))


class TextEncoder(nn.Module):
    """Transformer from input_ids [N, TOKENS] to embeddings [N, EMBEDDING], read at the last token."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(0.01 * torch.randn(TOKENS, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, EMBEDDING)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(self.tokens(input_ids) + self.positions)[:, -1])


class IconFeatures(nn.Module):
    """Both encoders, and the learned scale of the cosines."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.image, self.text = ImageEncoder().to(memory_format=torch.channels_last), TextEncoder(vocabulary)
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(pixel_values.contiguous(memory_format=torch.channels_last)), self.text(input_ids)


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift each of uint8 [B, 3, H, W], extending its edge, change its brightness and add noise; float32 in [-1, 1]."""
    _, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), mode="edge")
    moves = rng.integers(0, 2 * SHIFT + 1, (len(images), 2))
    shifted = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, moves, strict=True)]
    pixels = np.stack(shifted).astype(np.float32) / 127.5 - 1
    factor = 1 + BRIGHTNESS * rng.uniform(-1, 1, (len(images), 3, 1, 1)).astype(np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(0, NOISE, (len(images), 1, 1, 1))
    return np.clip(pixels * factor + noise, -1, 1).astype(np.float32)


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor, same: Tensor) -> Tensor:
    """Return CLIP's symmetric cross entropy of embeddings [B, D]; pairs [B, B] that are the `same` are left out."""
    scale = log_scale.exp().clamp(max=MAX_SCALE)
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    logits = logits.masked_fill(same, float("-inf"))
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def naming_loss(images: Tensor, names: Tensor, log_scale: Tensor, number: Tensor) -> Tensor:
    """Return the cross entropy of embeddings [B, D] over those of all names [M, D]; `number` [B] is the right one."""
    scale = log_scale.exp().clamp(max=MAX_SCALE)
    return F.cross_entropy(scale * F.normalize(images, dim=1) @ F.normalize(names, dim=1).T, number)


def retrieval(model: IconFeatures, icons: Icons, ids_of_names: Tensor, names: list[str]) -> float:
    """Return how often the name of a held-out combination is the nearest of all names."""
    held_out = icons.held_out()
    pixels = torch.from_numpy(icons.images(held_out)).to(ids_of_names.device).float() / 127.5 - 1
    with torch.no_grad():
        images, texts = model(pixels, ids_of_names)
    nearest = (images @ F.normalize(texts, dim=1).T).argmax(dim=1).cpu().numpy()
    return float((np.array(names)[nearest] == icons.names[held_out // len(COLOURS)]).mean())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the encoders that score generated icons.")
    parser.add_argument("--icons", type=Path, required=True, help="npz with rgba, caption and style")
    parser.add_argument("--out", type=Path, required=True, help="folder of the ONNX file and its configs")
    add_options(parser, steps=2500, batch=256, lr=1e-3, init=False)
    args = parser.parse_args(argv)
    check_options(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    icons = load_icons(args.icons)
    state_path = args.out / "features.pt"
    device = pick_device(args.device)
    prepare_folder(state_path, args)

    captions, names = icons.captions(), sorted(set(icons.names.tolist()))
    tokenizer = build_tokenizer(captions)
    of_captions, of_names = (torch.from_numpy(encoded_captions(tokenizer, texts)) for texts in (captions, names))
    number = np.searchsorted(names, icons.names)
    combinations = icons.training()
    if args.batch > len(combinations):
        raise SystemExit(f"--batch {args.batch} is more than the {len(combinations)} combinations of {args.icons}")
    torch.manual_seed(args.seed)
    model = IconFeatures(len(tokenizer)).to(device)

    def loss_of_step(step: int) -> Tensor:
        rng = np.random.default_rng([args.seed, step])
        picked = rng.choice(combinations, args.batch, replace=False)
        name = torch.from_numpy(number[picked // len(COLOURS)])
        ids = torch.cat([of_captions[picked], of_names]).to(device)
        same = (name[:, None] == name) & ~torch.eye(args.batch, dtype=torch.bool)
        pixels = torch.from_numpy(augmented(icons.images(picked), rng)).to(device)
        with autocast(device):
            images, texts = (found.float() for found in model(pixels, ids))
        own, every_name = texts[: args.batch], texts[args.batch :]
        contrast = contrastive_loss(images, own, model.log_scale, same.to(device))
        return contrast + naming_loss(images, every_name, model.log_scale, name.to(device))

    def on_sample(model: nn.Module, path: Path) -> None:
        model.eval()
        score = retrieval(model, icons, of_names.to(device), names)
        print(f"held-out combinations: the name is the nearest of {len(names)} for {score:.3f}", flush=True)
        model.train()

    # the last weights, not their average, to which the statistics of BatchNorm do not belong
    training = train(model, loss_of_step, on_sample, icons.sha256, state_path, args, averaged=False)
    if training.step < args.steps:
        return
    tokenizer.save_pretrained(args.out)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 64, "width": 64},
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    (args.out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    dummies = {"pixel_values": torch.zeros(2, 3, 64, 64), "input_ids": torch.zeros(3, TOKENS, dtype=torch.int64)}
    graph = exported(model.cpu(), dummies, ("image_embeds", "text_embeds"))
    file = args.out / "model.onnx"
    file.write_bytes(graph.SerializeToString(deterministic=True))
    onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    print(f"wrote {file} ({file.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
