"""Train a small Stable Diffusion on captioned icons from scratch: a text-to-image checkpoint to compress.

Three stages, each resumable, each starting from what the earlier ones left in --out:

    autoencoder    AutoencoderKL, f = 4: images [3, 64, 64] in [-1, 1] <-> latents [4, 16, 16].
                   Root mean square error of each image, L1 of its differences, and the KL divergence to N(0, 1)
    text_encoder   CLIPTextModel alone: its last SLICES states are trained to predict the latents of the image, one
                   horizontal slice each, through one linear layer that is discarded. The denoiser then has to learn
                   how to read captions, not what each of a thousand names looks like
    denoiser       UNet2DConditionModel on v = sqrt(a) e - sqrt(1 - a) z (Salimans & Ho 2022, arXiv:2202.00512), its
                   error weighted equally at all timesteps, one caption in ten left empty for classifier-free guidance
                   (Ho & Salimans 2022, arXiv:2207.12598). The text encoder is not trained further, as in Stable
                   Diffusion, so captions are encoded once

Min-SNR weighting gives the v error at high noise a weight of SNR, almost 0, and that is where a caption decides what is
drawn; with equal weights the names are learned several times earlier.

    python examples/pretrain_text_to_image.py autoencoder  --icons icons.npz --out teacher
    python examples/pretrain_text_to_image.py text_encoder --icons icons.npz --out teacher
    python examples/pretrain_text_to_image.py denoiser     --icons icons.npz --out teacher

--out is a `StableDiffusionPipeline` folder as soon as the last stage has written its first image grid.
"""

import argparse
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import make_image_grid
from icons import COLOURS, Icons, load_icons
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from training import (
    add_options,
    autocast,
    check_options,
    load_component,
    load_or_build,
    pick_device,
    prepare_folder,
    train,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS, VOCABULARY, WIDTH = 16, 2078, 192
SLICES = 8  # of the latents, one for each of the last tokens, which have seen captions of up to 8 tokens whole
CAPTION_DROPOUT = 0.1
KL_WEIGHT, EDGE_WEIGHT = 1e-4, 0.5
WHITE = 0.3  # fraction of training images over white; the other colours have equal shares
GRID_STEPS, GUIDANCE, GRID_COLUMNS, GRID_ROWS = 20, 3.0, 8, 4  # of image grids
EMPTY = -1  # in place of a combination: the empty caption


@dataclass(frozen=True)
class Data:
    """The training set of a run."""

    icons: Icons
    training: np.ndarray  # bool [N, colours]: whether the combination is not held out
    out: Path
    device: torch.device


def draw(data: Data, batch: int, seed: int, step: int) -> tuple[np.ndarray, np.random.Generator]:
    """Return the combinations int64 [batch] of a step, none of them held out, and the generator of its other draws."""
    rng = np.random.default_rng([seed, step])
    chance = np.full(len(COLOURS), (1 - WHITE) / (len(COLOURS) - 1))
    chance[list(COLOURS).index("white")] = WHITE
    icon = rng.integers(0, len(data.icons.rgba), batch)
    weights = chance * data.training[icon]
    edges = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
    colour = (rng.random((batch, 1)) > edges[:, :-1]).sum(axis=1)
    return icon * len(COLOURS) + colour, rng


def as_sample(images: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 [B, 3, H, W] to float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).float() / 127.5 - 1


def as_images(sample: Tensor) -> list[Image.Image]:
    """Convert [B, 3, H, W] in [-1, 1] to images."""
    pixels = ((sample.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        mid_block_add_attention=False,
        norm_num_groups=16,
        sample_size=64,
    )


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary of the captions, in CLIP's format."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    learned = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    learned.decoder = decoders.BPEDecoder("</w>")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]  # so that any text can be encoded
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learned.train_from_iterator(captions, trainer)
    with tempfile.TemporaryDirectory() as folder:
        _, merges = learned.model.save(folder)
        lines = Path(merges).read_text(encoding="utf-8").splitlines()[1:]
    pairs = [tuple(line.split(" ")) for line in lines]
    tokens = [*sorted(symbols), *dict.fromkeys("".join(pair) for pair in pairs)]
    vocabulary = {token: number for number, token in enumerate(tokens[: VOCABULARY - 2])}
    kept = [pair for pair in pairs if all(part in vocabulary for part in (*pair, "".join(pair)))]
    vocabulary |= {start: len(vocabulary), end: len(vocabulary) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=kept, model_max_length=TOKENS, unk_token=end, pad_token=end)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' name for the number of heads
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def encoded_captions(tokenizer: CLIPTokenizer, captions: list[str]) -> np.ndarray:
    """Return the token ids of captions, int64 [N, TOKENS]."""
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    return np.asarray(tokenizer(captions, **options)["input_ids"], np.int64)


@torch.no_grad()
def all_latents(data: Data, vae: AutoencoderKL, batch: int = 256) -> Tensor:
    """Return the scaled latents of every combination, float32 [combinations, 4, H / 4, W / 4]."""
    parts = []
    for start in range(0, data.icons.combinations, batch):
        combinations = np.arange(start, min(start + batch, data.icons.combinations))
        with autocast(data.device):
            latents = vae.encode(as_sample(data.icons.images(combinations), data.device)).latent_dist.mean
        parts.append(latents.float() * vae.config.scaling_factor)
    return torch.cat(parts)


@torch.no_grad()
def all_states(
    data: Data, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: list[str], batch: int = 512
) -> Tensor:
    """Return the text encoder's states of captions, float32 [N, TOKENS, WIDTH]."""
    ids = torch.from_numpy(encoded_captions(tokenizer, captions)).to(data.device)
    return torch.cat([text_encoder(part).last_hidden_state for part in ids.split(batch)])


def combinations_of_grid(data: Data) -> np.ndarray:
    """Return the combinations that image grids show."""
    return np.resize(data.icons.held_out(), GRID_ROWS * GRID_COLUMNS)


def save_image_grid(images: list[Image.Image], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, len(images) // GRID_COLUMNS, GRID_COLUMNS).save(path)


# --- the autoencoder -------------------------------------------------------------------------------------------------


def reconstruction_error(target: Tensor, output: Tensor) -> Tensor:
    """Return the mean over images of the root mean square error, plus the L1 error of differences."""
    error = (output - target).float()
    rmse = error.square().mean(dim=(1, 2, 3)).add(1e-6).sqrt().mean()
    return rmse + EDGE_WEIGHT * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


def autoencoder_stage(data: Data, args: argparse.Namespace) -> tuple[nn.Module, Callable, Callable]:
    vae = load_or_build(args.init, "vae", AutoencoderKL, build_autoencoder).to(data.device)

    def loss_of_step(step: int) -> Tensor:
        combinations, rng = draw(data, args.batch, args.seed, step)
        target = as_sample(data.icons.images(combinations), data.device)
        with autocast(data.device):
            posterior = vae.encode(target).latent_dist
            noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32)).to(data.device)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return reconstruction_error(target, output) + KL_WEIGHT * kl

    @torch.no_grad()
    def on_sample(vae: AutoencoderKL, path: Path) -> None:
        combinations = np.resize(np.arange(0, data.icons.combinations, 71), 256)  # 71 is odd: all colours
        target = as_sample(data.icons.images(combinations), data.device)
        latents = vae.encode(target).latent_dist.mean
        output = vae.decode(latents).sample.clamp(-1, 1)
        psnr = -10 * ((output - target) / 2).square().mean(dim=(1, 2, 3)).log10()
        print(f"reconstruction: {psnr.mean():.2f} dB PSNR on {len(target)} images, latents std {latents.std():.3f}")
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        vae.save_pretrained(data.out / "vae")
        pairs = zip(as_images(target), as_images(output), strict=True)
        save_image_grid([image for pair in pairs for image in pair][: GRID_ROWS * GRID_COLUMNS], path)

    return vae, loss_of_step, on_sample


# --- the text encoder ------------------------------------------------------------------------------------------------


class LatentsFromText(nn.Module):
    """The text encoder and the linear layer that reads slices of the latents [4, 16, 16] from its last states."""

    def __init__(self, text_encoder: CLIPTextModel, latents: Tensor) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(WIDTH, latents[0].numel() // SLICES)
        self.register_buffer("mean", latents.mean(dim=0))

    def forward(self, ids: Tensor) -> Tensor:
        states = self.text_encoder(ids).last_hidden_state[:, -SLICES:]
        channels, height, width = self.mean.shape
        slices = self.head(states).view(len(ids), SLICES, channels, height // SLICES, width)
        return slices.transpose(1, 2).reshape(len(ids), channels, height, width).float() + self.mean


def text_encoder_stage(data: Data, args: argparse.Namespace) -> tuple[nn.Module, Callable, Callable]:
    vae = load_component(data.out, "vae", AutoencoderKL).to(data.device)
    latents = all_latents(data, vae)
    tokenizer = build_tokenizer(data.icons.captions())
    tokenizer.save_pretrained(data.out / "tokenizer")
    ids = torch.from_numpy(encoded_captions(tokenizer, data.icons.captions())).to(data.device)
    model = LatentsFromText(build_text_encoder(tokenizer), latents).to(data.device)

    def loss_of_step(step: int) -> Tensor:
        combinations, _ = draw(data, args.batch, args.seed, step)
        with autocast(data.device):
            output = model(ids[combinations])
        return F.mse_loss(output, latents[combinations])

    @torch.no_grad()
    def on_sample(model: LatentsFromText, path: Path) -> None:
        held_out = data.icons.held_out()
        output = model(ids[held_out])
        error = (output - latents[held_out]).square().mean() / latents[held_out].var()
        print(f"held-out captions: {1 - error:.4f} of the variance of the latents is explained")
        model.text_encoder.save_pretrained(data.out / "text_encoder")
        shown = model(ids[combinations_of_grid(data)]) / vae.config.scaling_factor
        save_image_grid(as_images(vae.decode(shown).sample), path)

    return model, loss_of_step, on_sample


# --- the denoiser ----------------------------------------------------------------------------------------------------


def denoiser_stage(data: Data, args: argparse.Namespace) -> tuple[nn.Module, Callable, Callable]:
    vae = load_component(data.out, "vae", AutoencoderKL).to(data.device)
    tokenizer = CLIPTokenizer.from_pretrained(data.out / "tokenizer")
    text_encoder = load_component(data.out, "text_encoder", CLIPTextModel).to(data.device)
    unet = load_or_build(args.init, "unet", UNet2DConditionModel, build_unet).to(data.device)
    scheduler = build_scheduler()
    latents = all_latents(data, vae)
    captions = [*data.icons.captions(), ""]
    states = all_states(data, tokenizer, text_encoder, captions)

    def loss_of_step(step: int) -> Tensor:
        combinations, rng = draw(data, args.batch, args.seed, step)
        clean = latents[combinations]
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(data.device)
        # stratified: one timestep in each of `batch` equal intervals
        fractions = (rng.permutation(args.batch) + rng.random(args.batch)) / args.batch
        t = torch.from_numpy((fractions * scheduler.config.num_train_timesteps).astype(np.int64)).to(data.device)
        dropped = rng.random(args.batch) < CAPTION_DROPOUT
        conditioning = states[np.where(dropped, EMPTY, combinations)]
        with autocast(data.device):
            v = unet(scheduler.add_noise(clean, noise, t), t, encoder_hidden_states=conditioning).sample
        return F.mse_loss(v.float(), scheduler.get_velocity(clean, noise, t))

    def on_sample(unet: UNet2DConditionModel, path: Path) -> None:
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        prompts = [captions[combination] for combination in combinations_of_grid(data)]
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            prompts, num_inference_steps=GRID_STEPS, guidance_scale=GUIDANCE, generator=generator, output_type="pil"
        ).images
        save_image_grid(images, path)
        pipeline.save_pretrained(data.out)
        unet.train()

    return unet, loss_of_step, on_sample


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stage: what builds it, the components of --out that it reads, and the defaults of its options."""

    build: Callable[[Data, argparse.Namespace], tuple[nn.Module, Callable, Callable]]
    reads: dict[str, type]
    steps: int
    batch: int
    lr: float


STAGES = {
    "autoencoder": Stage(autoencoder_stage, {}, 2000, 32, 1e-3),
    "text_encoder": Stage(text_encoder_stage, {"vae": AutoencoderKL}, 2500, 256, 1.5e-3),
    "denoiser": Stage(denoiser_stage, {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}, 20000, 64, 1e-3),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Stable Diffusion on captioned icons.")
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, defaults in STAGES.items():
        stage = stages.add_parser(name)
        stage.add_argument("--icons", type=Path, required=True, help="npz with rgba, caption and style")
        stage.add_argument("--out", type=Path, required=True, help="pipeline folder; <stage>.pt is the checkpoint")
        add_options(stage, defaults.steps, defaults.batch, defaults.lr, init=name != "text_encoder")
    args = parser.parse_args(argv)
    check_options(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    icons = load_icons(args.icons)
    state_path = args.out / f"{args.stage}.pt"
    device = pick_device(args.device)
    prepare_folder(state_path, args)

    training = np.isin(np.arange(icons.combinations), icons.training()).reshape(len(icons.rgba), len(COLOURS))
    torch.manual_seed(args.seed)
    model, loss_of_step, on_sample = STAGES[args.stage].build(Data(icons, training, args.out, device), args)
    digest = hashlib.sha256(icons.sha256.encode())
    for component, kind in STAGES[args.stage].reads.items():  # what is trained on these belongs to them
        for _, weight in sorted(load_component(args.out, component, kind).state_dict().items()):
            digest.update(weight.numpy().tobytes())
    train(model, loss_of_step, on_sample, digest.hexdigest(), state_path, args)


if __name__ == "__main__":
    main()
