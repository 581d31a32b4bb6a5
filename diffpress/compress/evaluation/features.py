"""Feature networks for scoring images, and reference features of real images.

An ONNX image encoder is recognized by its image input:

    sample         float32 [N, C, H, W] in the model's data range; outputs `features` [N, D] and, for label accuracy,
                   `logits` [N, classes]. The built-in network is of this kind.
    pixel_values   any encoder exported from transformers, with its preprocessor_config.json in the same folder; output
                   `image_embeds`, `pooler_output`, or the only one of shape [N, D]. With an input `input_ids`, an
                   output `text_embeds` and a tokenizer in the folder (CLIP), prompts are scored as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.compress.evaluation.metrics import kernel_within
from diffpress.compress.sources.layout import first_line
from diffpress.compress.training.sample_data import read_images
from diffpress.runtime.bundle import sha256
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.arrays import read_npz
from diffpress.runtime.io.images import to_uint8
from diffpress.runtime.io.open_image import IMAGE_ERRORS, open_image
from diffpress.runtime.spec import DenoiserSpec, is_picture

PREPROCESSOR = "preprocessor_config.json"
EMBEDDINGS = ("image_embeds", "pooler_output")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 256


@dataclass(frozen=True)
class Reference:
    """Features [M, D] of real images; `source` records their file, its hash and the number of images."""

    features: np.ndarray
    source: dict[str, Any]

    @cached_property
    def kernel_within(self) -> float:
        """Term of the KID that depends only on the reference."""
        return kernel_within(self.features)


@dataclass(frozen=True)
class FeatureNetwork:
    """Feature network.

    Attributes:
        name: Name of its file.
        sha256: Hash of its file.
        run: Images float32 [N, C, H, W] in the model's data range -> features [N, D], logits [N, classes] or None.
        embed_text: Prompts -> features [N, D] in the space of the images' (CLIP); None if it has no text encoder.
        embed_pixels: uint8 [N, H, W, C] of any size -> features; None if only the model's own size fits.
    """

    name: str
    sha256: str
    run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
    embed_text: Callable[[Sequence[str]], np.ndarray] | None = None
    embed_pixels: Callable[[np.ndarray], np.ndarray] | None = None


def load_features(path: Path, spec: DenoiserSpec, threads: int | None = None) -> FeatureNetwork:
    """Load an ONNX feature network and check that it accepts the model's images.

    Raises:
        InvalidInputError: The file is not readable, is no image encoder, or does not fit the images.
    """
    if not is_picture(image_shape(spec)):
        raise InvalidInputError(
            f"evaluate scores pictures, with 1, 3 or 4 channels; the model samples "
            f"{list(spec.sample_shape)}; compare the arrays of 'diffpress sample --out samples.npy' instead"
        )
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's error types are private
        raise InvalidInputError(f"{path}: not readable as a feature network ({first_line(error)})") from error
    inputs = {entry.name: entry for entry in session.get_inputs()}
    if "sample" in inputs:
        return _of_samples(path, session, spec)
    if "pixel_values" in inputs:
        return _of_pixel_values(path, session, spec)
    raise InvalidInputError(
        f"{path}: has the inputs {', '.join(inputs)}; an image encoder takes 'sample' or 'pixel_values'"
    )


def image_shape(spec: DenoiserSpec) -> tuple[int, ...]:
    """Return (channels, height, width) of the final images; decoded latents are RGB."""
    return tuple(spec.sample_shape) if spec.is_pixel_space else (3, *spec.image_size)


def _of_samples(path: Path, session: Any, spec: DenoiserSpec) -> FeatureNetwork:
    """Return a network that takes images as the model makes them."""
    (entry,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    if "features" not in names:
        raise InvalidInputError(f"{path}: has no output 'features', only {', '.join(names)}")
    shape = tuple(entry.shape[1:])
    if shape != image_shape(spec):
        raise InvalidInputError(
            f"{path}: this feature network expects images {list(shape)}, the model samples {list(image_shape(spec))}; "
            "pass a matching one with --features NET.onnx (input 'sample', outputs 'features' and 'logits', or any "
            f"encoder with input 'pixel_values' and {PREPROCESSOR} beside it)"
        )
    wanted = ["features", "logits"] if "logits" in names else ["features"]

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        features, *logits = session.run(wanted, {"sample": images})
        return features, logits[0] if logits else None

    return FeatureNetwork(path.name, sha256(path), run)


def _of_pixel_values(path: Path, session: Any, spec: DenoiserSpec) -> FeatureNetwork:
    """Return an encoder exported from transformers; images are preprocessed by the config in its folder."""
    from transformers import AutoImageProcessor

    if not (path.parent / PREPROCESSOR).is_file():
        raise InvalidInputError(
            f"{path.parent / PREPROCESSOR}: not found; {path.name} takes 'pixel_values', and without this file its "
            "image size and normalization are unknown. Copy the encoder's whole folder"
        )
    try:
        processor: Any = AutoImageProcessor.from_pretrained(path.parent, backend="pil")
    except Exception as error:  # transformers raises many types
        raise InvalidInputError(f"{path.parent / PREPROCESSOR}: cannot be used ({first_line(error)})") from error
    output = _embedding(path, session)
    takes_text = any(entry.name == "input_ids" for entry in session.get_inputs())
    tokenize = _tokenizer(path.parent) if takes_text else None
    side = 32  # any image will do beside a text, and any text beside an image: both halves are evaluated together

    def embed(pixels: np.ndarray, prompts: Sequence[str], name: str) -> np.ndarray:
        rgb = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
        feed = {"pixel_values": processor(images=list(rgb), return_tensors="np")["pixel_values"].astype(np.float32)}
        texts = tokenize(prompts) if tokenize is not None else {}
        known = {entry.name for entry in session.get_inputs()}
        (found,) = session.run([name], feed | {key: value for key, value in texts.items() if key in known})
        return np.asarray(found)

    def embed_pixels(pixels: np.ndarray) -> np.ndarray:
        return embed(pixels, [""], output)

    def embed_text(prompts: Sequence[str]) -> np.ndarray:
        return embed(np.zeros((1, side, side, 3), np.uint8), prompts, "text_embeds")

    def run(images: np.ndarray) -> tuple[np.ndarray, None]:
        return embed_pixels(to_uint8(images, spec.data_range)), None

    return FeatureNetwork(path.name, sha256(path), run, embed_text if takes_text else None, embed_pixels)


def _embedding(path: Path, session: Any) -> str:
    """Return the name of the output that holds one feature vector per image."""
    outputs = {entry.name: len(entry.shape) for entry in session.get_outputs()}
    named = [name for name in EMBEDDINGS if name in outputs]
    vectors = named or [name for name, rank in outputs.items() if rank == 2]
    if len(vectors) != 1 and not named:
        raise InvalidInputError(
            f"{path}: its outputs are {', '.join(outputs)}; expected {' or '.join(EMBEDDINGS)}, or one of shape [N, D]"
        )
    return vectors[0]


def _tokenizer(folder: Path) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizer classes raise many types
        raise InvalidInputError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error

    def tokenize(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return dict(tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="np"))

    return tokenize


def load_reference(path: Path, network: FeatureNetwork, spec: DenoiserSpec) -> Reference:
    """Load reference features from an npz file, or compute them from the images of an npz file or a folder.

    Raises:
        InvalidInputError: The file is not readable, its features come from another network, or the shapes differ.
    """
    if path.is_dir():
        return _of_folder(path, network)
    stored = read_npz(path)
    if "features" in stored:
        if str(stored.get("features_sha256")) != network.sha256:
            raise InvalidInputError(
                f"{path}: its features were computed by a network other than {network.name}; pass images instead"
            )
        features = stored["features"].astype(np.float64)
    else:
        features = np.concatenate(list(_features_of(path, network, spec))).astype(np.float64)
    return Reference(features, {"file": path.name, "sha256": sha256(path), "images": len(features)})


def _features_of(path: Path, network: FeatureNetwork, spec: DenoiserSpec) -> Iterator[np.ndarray]:
    images = read_images(path)
    if network.embed_pixels is None and images.shape[1:] != image_shape(spec):
        raise InvalidInputError(
            f"{path}: images are {list(images.shape[1:])}, the model samples {list(image_shape(spec))}"
        )
    low, high = spec.data_range
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        if network.embed_pixels is not None:
            yield network.embed_pixels(batch.transpose(0, 2, 3, 1))
        else:
            yield network.run(batch.astype(np.float32) * ((high - low) / 255.0) + low)[0]


def _of_folder(folder: Path, network: FeatureNetwork) -> Reference:
    """Compute the features of a folder's pictures, which may differ in size."""
    import hashlib

    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not files or network.embed_pixels is None:
        reason = f"has no pictures ({', '.join(PICTURES)})" if not files else f"{network.name} takes an .npz of images"
        raise InvalidInputError(f"{folder}: {reason}")
    digest, found = hashlib.sha256(), []
    for file in files:
        try:
            with open_image(file) as opened:
                pixels = np.asarray(opened.convert("RGB"))
        except IMAGE_ERRORS as error:
            raise InvalidInputError(f"{file}: not readable as a picture ({error})") from error
        digest.update(pixels.tobytes())
        found.append(network.embed_pixels(pixels[None]))
    features = np.concatenate(found).astype(np.float64)
    return Reference(features, {"file": folder.name, "sha256": digest.hexdigest(), "images": len(features)})
