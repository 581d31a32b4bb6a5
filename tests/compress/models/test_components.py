"""compress/models/components.py: text encoders and decoders match transformers and diffusers, named as in optimum."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffpress.compress.models.components import component_names, encode_prompts, load_component
from diffpress.compress.sources.layout import INDEX
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError

PROMPTS = ["a photo of a cat", "red dog!"]


@pytest.fixture
def copied(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(tiny_folder(kind), tmp_path / kind)


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def opened(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


HIDDEN = ["hidden_states.0", "hidden_states.1", "hidden_states.2"]  # of two layers: the input, and the output of each
OUTPUTS = [
    ("sd", "text_encoder", ["last_hidden_state", "pooler_output", *HIDDEN]),
    ("sdxl", "text_encoder_2", ["text_embeds", "last_hidden_state", *HIDDEN]),
    ("pixart-alpha", "text_encoder", ["last_hidden_state"]),
    ("flux", "text_encoder_2", ["last_hidden_state"]),
]


@pytest.mark.parametrize(("kind", "name", "names"), OUTPUTS)
def test_a_text_encoder_returns_the_outputs_of_transformers_named_as_in_optimum(
    kind: str, name: str, names: list[str], tiny_folder: Callable[..., Path]
) -> None:
    component, reference = (
        load_component(load_checkpoint(tiny_folder(kind)), name),
        getattr(opened(tiny_folder(kind)), name),
    )
    assert component.outputs == names
    ids = torch.randint(0, 60, component.examples["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    feed = {**component.examples, "input_ids": ids}
    if "attention_mask" in feed:
        feed["attention_mask"] = (torch.arange(ids.shape[1]) < 9).long().expand_as(ids).contiguous()
    found = component.run_all({key: value.numpy() for key, value in feed.items()})
    with torch.no_grad():
        expected = reference(**feed, output_hidden_states=True)
    assert list(found) == names
    for key, array in found.items():
        field, _, index = key.partition(".")
        theirs = expected[field][int(index)] if index else expected[field]
        np.testing.assert_array_equal(array, theirs.numpy(), err_msg=key)


@pytest.mark.parametrize(("kind", "masked"), [("sd", False), ("pixart-alpha", True), ("sd3", False), ("flux", False)])
def test_the_mask_is_an_input_only_if_the_denoiser_also_receives_it(
    kind: str, masked: bool, tiny_folder: Callable[..., Path]
) -> None:
    checkpoint = load_checkpoint(tiny_folder(kind))
    for encoder in checkpoint.spec.conditioning.encoders:
        component = load_component(checkpoint, encoder.graph)
        assert set(component.inputs) == ({"input_ids", "attention_mask"} if masked else {"input_ids"})
        assert component.examples["input_ids"].shape[1] == encoder.length
        assert set(component.inputs.values()) == {np.dtype(np.int64)}


@pytest.mark.parametrize("kind", ["sd", "ldm"])
def test_the_decoder_is_that_of_diffusers_without_its_encoder(kind: str, tiny_folder: Callable[..., Path]) -> None:
    component, pipe = load_component(load_checkpoint(tiny_folder(kind)), "vae_decoder"), opened(tiny_folder(kind))
    reference = pipe.vae if kind == "sd" else pipe.vqvae
    assert (component.folder, component.outputs) == ("vae" if kind == "sd" else "vqvae", ["sample"])
    assert not hasattr(component.module, "encoder")
    with torch.no_grad():
        expected = reference.decode(component.examples["latent_sample"]).sample
    found = component.run_all({"latent_sample": component.examples["latent_sample"].numpy()})["sample"]
    np.testing.assert_array_equal(found, expected.numpy())


COMPONENTS = {
    "ldm": ["vae_decoder"],
    "dit": ["vae_decoder"],
    "sd": ["text_encoder", "vae_decoder"],
    "sdxl": ["text_encoder", "text_encoder_2", "vae_decoder"],
    "sd3": ["text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder"],
}


@pytest.mark.parametrize("kind", COMPONENTS)
def test_the_graphs_around_a_denoiser_are_listed_text_encoders_first(
    kind: str, tiny_folder: Callable[..., Path]
) -> None:
    found = component_names(load_checkpoint(tiny_folder(kind)))
    assert sorted(found) == COMPONENTS[kind] and found[-1] == "vae_decoder"


def test_a_bare_denoiser_has_no_components_and_encodes_no_prompts(tiny_folder: Callable[..., Path]) -> None:
    checkpoint = load_checkpoint(tiny_folder("sd") / "unet")
    assert component_names(checkpoint) == []
    refused(lambda: encode_prompts(checkpoint, PROMPTS), "text encoders", "whole pipeline")


def test_encoded_prompts_are_those_of_the_pipeline(tiny_folder: Callable[..., Path]) -> None:
    checkpoint, pipe = load_checkpoint(tiny_folder("sdxl")), opened(tiny_folder("sdxl"))
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    found = encode_prompts(checkpoint, PROMPTS)
    # the order of additions differs between batch layouts
    np.testing.assert_allclose(found["encoder_hidden_states"], states, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["text_embeds"], pooled, rtol=0, atol=1e-5)
    assert found["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    uncond = encode_prompts(checkpoint, None)
    assert not uncond["encoder_hidden_states"].any() and uncond["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


@pytest.mark.parametrize(
    ("component", "entry", "named"),
    [
        ("text_encoder", ["transformers", "GemmaModel"], "GemmaModel"),
        ("text_encoder", ["my_encoder", "CLIPTextModel"], "my_encoder.CLIPTextModel"),
        ("vae", ["diffusers", "ConsistencyDecoderVAE"], "ConsistencyDecoderVAE"),
    ],
)
def test_a_component_of_an_unknown_class_is_refused_by_name(
    component: str, entry: list[str], named: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("sd")
    checkpoint = load_checkpoint(folder)
    edit(folder / INDEX, **{component: entry})
    name = "vae_decoder" if component == "vae" else component
    refused(lambda: load_component(checkpoint, name), str(folder / component), named, "supported")


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_a_component_without_weights_is_refused_by_name(component: str, copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    for file in (folder / component).glob("*.safetensors"):
        file.unlink()
    checkpoint = load_checkpoint(folder)
    refused(
        lambda: load_component(checkpoint, "vae_decoder" if component == "vae" else component),
        str(folder / component),
        "no weight files",
    )


# --- what diffusers makes of the index and the configs -----------------------------------------------------------


SWAPPED = [
    ("sd", "text_encoder", {"architectures": None}),
    ("sd", "text_encoder", {"architectures": ["CLIPModel"]}),
    ("sdxl", "text_encoder_2", {"architectures": ["CLIPTextModel"]}),
    ("pixart-alpha", "text_encoder", {"architectures": ["T5ForConditionalGeneration"]}),
    ("sd", "vae", {"_class_name": "SomethingElse"}),
]


@pytest.mark.parametrize(("kind", "component", "changes"), SWAPPED)
def test_the_class_in_the_index_decides_over_the_config(
    kind: str,
    component: str,
    changes: dict[str, Any],
    tiny_folder: Callable[..., Path],
    copied: Callable[[str], Path],
) -> None:
    folder, name = copied(kind), "vae_decoder" if component == "vae" else component
    checkpoint = load_checkpoint(folder)
    edit(folder / component / "config.json", **changes)
    found, expected = load_component(checkpoint, name), load_component(load_checkpoint(tiny_folder(kind)), name)
    assert type(found.module) is type(expected.module) and found.outputs == expected.outputs


@pytest.mark.parametrize("use", [True, False])
def test_the_mask_is_passed_to_an_encoder_whose_config_asks_for_it(use: bool, copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    edit(folder / "text_encoder" / "config.json", use_attention_mask=use)
    with torch.no_grad():
        expected = opened(folder).encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)[0]
    found = encode_prompts(load_checkpoint(folder), PROMPTS)["encoder_hidden_states"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    plain = encode_prompts(load_checkpoint(copied_again(folder)), PROMPTS)["encoder_hidden_states"]
    assert np.allclose(found, plain, atol=1e-5) != use


def copied_again(folder: Path) -> Path:
    """Copy the pipeline without the setting."""
    other = Path(shutil.copytree(folder, folder.with_name("plain")))
    edit(other / "text_encoder" / "config.json", use_attention_mask=False)
    return other


def test_a_decoder_without_its_encoder_exports_the_same_graph(copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    checkpoint = load_checkpoint(folder)
    whole = load_component(checkpoint, "vae_decoder")
    (file,) = (folder / "vae").glob("*.safetensors")
    state = {k: v for k, v in load_file(file).items() if not k.startswith(("encoder.", "quant_conv."))}
    save_file(state, file)
    component = load_component(checkpoint, "vae_decoder")
    latents = {"latent_sample": whole.examples["latent_sample"].numpy()}
    np.testing.assert_array_equal(component.run_all(latents)["sample"], whole.run_all(latents)["sample"])
    assert not any(parameter.is_meta for parameter in component.module.parameters())
