"""compress/evaluation/features.py: any image encoder, checked against transformers' own CLIP."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import EvaluateConfig
from diffpress.compress.evaluation.evaluate import evaluate
from diffpress.compress.evaluation.features import FeatureNetwork, load_features, load_reference
from diffpress.compress.evaluation.subject import EvaluationSubject
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import dummy_conditioning
from tests.pipelines import CLIP_TOKENS, clip_tokenizer

PROMPTS = ("a red cat", "a photo of a dog")


class _Clip(nn.Module):
    """CLIP with the outputs of an exported model, in its order."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        found = self.model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)
        return found.logits_per_image, found.text_embeds, found.image_embeds


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    """Export a tiny CLIP as exporters of transformers models do: model.onnx, its preprocessor and its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_TOKENS, "bos_token_id": 0}
    text["eos_token_id"] = len(tokenizer) - 1
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, **layers}
    model = CLIPModel(CLIPConfig(text_config={**text, **layers}, vision_config=vision, projection_dim=12)).eval()
    ids = torch.randint(0, len(tokenizer), (2, CLIP_TOKENS))
    arguments = (ids, torch.randn(3, 3, 16, 16), torch.ones_like(ids))
    names = ["input_ids", "pixel_values", "attention_mask"]
    texts, images = torch.export.Dim("texts"), torch.export.Dim("images")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        torch.onnx.export(
            _Clip(model).eval(),
            arguments,
            str(folder / "model.onnx"),
            input_names=names,
            output_names=["logits_per_image", "text_embeds", "image_embeds"],
            dynamic_shapes=({0: texts}, {0: images}, {0: texts}),
            dynamo=True,
            verbose=False,
        )
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def encoder(clip: tuple[Path, CLIPModel], unet: Checkpoint) -> FeatureNetwork:
    return load_features(clip[0] / "model.onnx", unet.spec, threads=1)


def features_in_transformers(clip: tuple[Path, CLIPModel], pixels: np.ndarray) -> np.ndarray:
    """Return the image embeddings [N, 12] of uint8 [N, H, W, 3]."""
    values = CLIPImageProcessorPil.from_pretrained(clip[0])(images=list(pixels), return_tensors="pt")["pixel_values"]
    ids = torch.zeros(1, CLIP_TOKENS, dtype=torch.int64)
    with torch.no_grad():
        return np.asarray(clip[1](input_ids=ids, pixel_values=values).image_embeds)


def test_images_are_preprocessed_as_the_encoders_folder_says(
    clip: tuple[Path, CLIPModel], encoder: FeatureNetwork
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
    features, logits = encoder.run(images)
    assert logits is None
    np.testing.assert_allclose(features, features_in_transformers(clip, pixels), atol=1e-5)


def test_grey_images_are_repeated_to_rgb(clip: tuple[Path, CLIPModel], encoder: FeatureNetwork) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    found, _ = encoder.run(grey.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)
    np.testing.assert_allclose(found, features_in_transformers(clip, np.repeat(grey, 3, -1)), atol=1e-5)


def test_prompts_are_embedded_by_the_text_encoder(clip: tuple[Path, CLIPModel], encoder: FeatureNetwork) -> None:
    assert encoder.embed_text is not None
    texts = clip_tokenizer()(list(PROMPTS), padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip[1](**texts, pixel_values=torch.zeros(1, 3, 16, 16)).text_embeds
    np.testing.assert_allclose(encoder.embed_text(PROMPTS), np.asarray(expected), atol=1e-5)


def test_a_text_model_gets_a_clip_score_and_a_retrieval_accuracy(
    clip: tuple[Path, CLIPModel], encoder: FeatureNetwork, plain: Checkpoint, tmp_path: Path
) -> None:
    # the score is the mean cosine of each image with its own prompt
    def encode(prompts: Any, spec: Any) -> Any:
        return dummy_conditioning(spec, len(prompts))

    subject = EvaluationSubject(TorchNetwork(plain.model, plain.spec), plain.spec, encode=encode, texts=PROMPTS)
    np.savez(tmp_path / "real.npz", x=np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    reference = load_reference(tmp_path / "real.npz", encoder, plain.spec)
    config = EvaluateConfig(samples=8, seeds=1, batch=8)
    drawn: list[np.ndarray] = []

    def run(images: np.ndarray) -> tuple[np.ndarray, None]:
        drawn.append(encoder.run(images)[0])
        return drawn[-1], None

    watched = FeatureNetwork(encoder.name, encoder.sha256, run, encoder.embed_text, encoder.embed_pixels)
    found = evaluate(subject, config, watched, reference)
    assert encoder.embed_text is not None
    texts = encoder.embed_text([PROMPTS[i % 2] for i in range(8)])
    images = np.concatenate(drawn)
    cosines = (images * texts).sum(1) / np.linalg.norm(images, axis=1) / np.linalg.norm(texts, axis=1)
    assert found["clip_score"]["mean"] == pytest.approx(100 * cosines.clip(0).mean(), rel=1e-5)
    other = encoder.embed_text([PROMPTS[(i + 1) % 2] for i in range(8)])
    others = (images * other).sum(1) / np.linalg.norm(images, axis=1) / np.linalg.norm(other, axis=1)
    assert found["retrieval"] == {"mean": pytest.approx((cosines > others).mean()), "sd": None, "candidates": 2}


def test_a_folder_of_pictures_of_any_size_is_a_reference(
    clip: tuple[Path, CLIPModel], encoder: FeatureNetwork, plain: Checkpoint, tmp_path: Path
) -> None:
    rng, expected = np.random.default_rng(0), []
    for number, (height, width) in enumerate([(20, 30), (16, 16), (40, 17)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        expected.append(features_in_transformers(clip, pixels[None]))
    found = load_reference(tmp_path, encoder, plain.spec)
    np.testing.assert_allclose(found.features, np.concatenate(expected), atol=1e-5)
    assert found.source["images"] == 3


def test_an_encoder_without_its_preprocessor_is_refused(
    clip: tuple[Path, CLIPModel], plain: Checkpoint, tmp_path: Path
) -> None:
    for file in clip[0].glob("model.onnx*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InvalidInputError, match=r"preprocessor_config.json: not found; .*normalization are unknown"):
        load_features(tmp_path / "model.onnx", plain.spec)


def _graph(inputs: list[str], outputs: dict[str, list[Any]], path: Path) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 8, 8]) for name in inputs]
    found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    nodes = [helper.make_node("Flatten" if len(s) == 2 else "Identity", [inputs[0]], [n]) for n, s in outputs.items()]
    graph = helper.make_graph(nodes, "g", values, found)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_a_network_that_is_no_image_encoder_is_refused(
    clip: tuple[Path, CLIPModel], plain: Checkpoint, tmp_path: Path
) -> None:
    other = _graph(["x"], {"y": ["n", 192]}, tmp_path / "other.onnx")
    with pytest.raises(InvalidInputError, match="has the inputs x; an image encoder takes 'sample' or 'pixel_values'"):
        load_features(other, plain.spec)
    (tmp_path / "preprocessor_config.json").write_bytes((clip[0] / "preprocessor_config.json").read_bytes())
    maps = _graph(["pixel_values"], {"map": ["n", 3, 8, 8]}, tmp_path / "maps.onnx")
    with pytest.raises(InvalidInputError, match=r"its outputs are map; expected image_embeds .* or one of shape"):
        load_features(maps, plain.spec)
