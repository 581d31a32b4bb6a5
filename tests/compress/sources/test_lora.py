"""compress/sources/lora.py: every tensor of a LoRA has its effect, in each layout of names, or the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.sources.lora import fuse_loras
from diffpress.runtime.errors import InvalidInputError
from tests.pipelines import tiny_pipeline

# layers of the tiny Stable Diffusion, and their names in kohya's layout
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
TEXT = "encoder.layers.1.self_attn.q_proj"
TEXT_OUT = "encoder.layers.1.self_attn.out_proj"  # diffusers recognizes kohya's text encoder layers by it
LAYERS = {"unet": (UNET, OTHER), "text_encoder": (TEXT, TEXT_OUT)}
KOHYA = {
    UNET: f"lora_unet_{UNET.replace('.', '_')}",
    OTHER: f"lora_unet_{OTHER.replace('.', '_')}",
    TEXT: f"lora_te_text_model_{TEXT.replace('.', '_')}",
    TEXT_OUT: f"lora_te_text_model_{TEXT_OUT.replace('.', '_')}",
}
RANKS = {UNET: (3, 6.0), OTHER: (5, 1.0), TEXT: (2, 4.0), TEXT_OUT: (4, 4.0)}  # layer -> rank, alpha

Tensors = dict[str, torch.Tensor]


def opened(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Draw down [rank, in] and up [out, rank] for each layer of RANKS."""
    pipe, generator = opened(folder), torch.Generator().manual_seed(0)
    drawn = {}
    for component, layers in LAYERS.items():
        for layer in layers:
            out, width = getattr(pipe, component).get_submodule(layer).weight.shape
            rank = RANKS[layer][0]
            down, up = (torch.randn(shape, generator=generator) for shape in ((rank, width), (out, rank)))
            drawn[layer] = (down, up)
    return drawn


def kohya(folder: Path) -> Tensors:
    state: Tensors = {}
    for layer, (down, up) in factors(folder).items():
        name = KOHYA[layer]
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        state[f"{name}.alpha"] = torch.tensor(RANKS[layer][1])
    return state


def peft_names(folder: Path) -> Tensors:
    state: Tensors = {}
    for component, layers in LAYERS.items():
        for layer in layers:
            down, up = factors(folder)[layer]
            prefix = "text_encoder.text_model" if component == "text_encoder" else component
            state |= {f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": up}
    return state


def old_names(folder: Path) -> Tensors:
    """Name the tensors as diffusers < 0.22 did."""
    names = {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."}
    state: Tensors = {}
    for name, tensor in peft_names(folder).items():
        for new, old in names.items():
            name = name.replace(new, old if name.startswith("text") else old.replace("lora_linear_layer", "lora"))
        state[name] = tensor
    return state


@pytest.fixture
def folder(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder("sd")


@pytest.fixture
def fused(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Save tensors as a LoRA, fuse it and return the pipeline."""

    def fuse(tensors: Tensors, scale: float = 1.0, into: Path = folder) -> Any:
        save_file(tensors, tmp_path / "lora.safetensors")
        return opened(fuse_loras(into, [f"{tmp_path / 'lora.safetensors'}:{scale}"], tmp_path / "fused"))

    return fuse


# --- layouts of names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [kohya, peft_names, old_names])
def test_ranks_and_alphas_of_every_layer_are_followed_in_every_layout(
    layout: Callable[[Path], Tensors], folder: Path, fused: Callable[..., Any]
) -> None:
    before, after = opened(folder), fused(layout(folder), 0.7)
    drawn = factors(folder)
    for component in ("unet", "text_encoder"):
        old, new = getattr(before, component).state_dict(), getattr(after, component).state_dict()
        for name, tensor in old.items():
            layer = name.removesuffix(".weight")
            if layer in drawn and layer != name:
                rank, alpha = RANKS[layer]
                scale = 0.7 * (alpha / rank if layout is kohya else 1.0)
                down, up = drawn[layer]
                tensor = tensor + scale * up @ down
            torch.testing.assert_close(new[name], tensor, rtol=0, atol=1e-5)


def flux_kohya(pipe: Any) -> Tensors:
    """Draw a LoRA of the fused qkv, which diffusers splits, and of its output."""
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    shapes = {
        "lora_unet_double_blocks_0_img_attn_qkv": (3 * width, width),
        "lora_unet_double_blocks_0_img_attn_proj": (width, width),
    }
    state: Tensors = {}
    for name, (out, into) in shapes.items():
        state |= {f"{name}.lora_down.weight": torch.randn(2, into), f"{name}.lora_up.weight": torch.randn(out, 2)}
        state[f"{name}.alpha"] = torch.tensor(1.0)
    return state


def flux_xlabs(pipe: Any) -> Tensors:
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    name = "double_blocks.0.processor.qkv_lora1"
    return {f"{name}.down.weight": torch.randn(2, width), f"{name}.up.weight": torch.randn(3 * width, 2)}


@pytest.mark.parametrize("layout", [flux_kohya, flux_xlabs])
def test_a_lora_of_flux_is_fused_as_in_diffusers(
    layout: Callable[[Any], Tensors], tiny_folder: Callable[..., Path], fused: Callable[..., Any], tmp_path: Path
) -> None:
    theirs = opened(tiny_folder("flux"))
    state = layout(theirs)
    found = fused(state, into=tiny_folder("flux"))
    plain = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    expected = theirs.transformer.state_dict()
    assert any(not torch.equal(plain[name], expected[name]) for name in plain)
    for name, tensor in found.transformer.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_a_dora_in_diffusers_layout_is_fused_as_in_diffusers(
    folder: Path, fused: Callable[..., Any], tmp_path: Path
) -> None:
    theirs = opened(folder)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False)
    theirs.unet.add_adapter(config)
    for name, parameter in theirs.unet.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    layers = get_peft_model_state_dict(theirs.unet)
    state = {f"unet.{name}": tensor for name, tensor in layers.items()}
    assert any("lora_magnitude_vector" in name for name in state)
    theirs.fuse_lora(components=["unet"])
    theirs.unet.delete_adapters("default")
    expected, found = opened(folder), fused(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "again.safetensors")
    expected.load_lora_weights(tmp_path, weight_name="again.safetensors")
    expected.fuse_lora()
    expected.unload_lora_weights()
    for name, tensor in found.unet.state_dict().items():
        torch.testing.assert_close(tensor, expected.unet.state_dict()[name], rtol=0, atol=1e-5)


def test_loras_of_different_components_are_fused_together(folder: Path, tmp_path: Path) -> None:
    state, before = kohya(folder), opened(folder)
    halves = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    for component, prefix in halves.items():
        save_file({k: v for k, v in state.items() if k.startswith(prefix)}, tmp_path / f"{component}.safetensors")
    files = [f"{tmp_path / 'unet.safetensors'}:0.5", f"{tmp_path / 'text_encoder.safetensors'}:2"]
    after, drawn = opened(fuse_loras(folder, files, tmp_path / "fused")), factors(folder)
    for component, layer, scale in (("unet", UNET, 0.5), ("text_encoder", TEXT, 2.0)):
        rank, alpha = RANKS[layer]
        down, up = drawn[layer]
        old, new = (getattr(pipe, component).get_submodule(layer).weight for pipe in (before, after))
        torch.testing.assert_close(new, old + scale * alpha / rank * up @ down, rtol=0, atol=1e-5)


# --- refused ---------------------------------------------------------------------------------------------------


NAME, OUT, IN = KOHYA[UNET], 32, 32
ADDED = [
    (f"{NAME}.dora_scale", (OUT, 1)),
    (f"{NAME}.diff_b", (OUT,)),
    (f"{NAME}.lora_mid.weight", (3, 3)),
    (f"{KOHYA[OTHER]}x.hada_w1_a", (OUT, 2)),
    (f"{KOHYA[OTHER]}x.lokr_w1", (4, 4)),
    ("lora_unet_down_blocks_0_norm1.diff", (OUT,)),
    ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", (2, 32)),
    (f"{NAME}_far.alpha", ()),
    ("bundle_emb.cat.string_to_param.*", (2, 32)),
]


@pytest.mark.parametrize(("name", "shape"), ADDED)
def test_a_tensor_that_has_no_effect_is_named(
    name: str, shape: tuple[int, ...], folder: Path, fused: Callable[..., Any], tmp_path: Path
) -> None:
    state = {**kohya(folder), name: torch.ones(shape)}
    refused(lambda: fused(state), str(tmp_path / "lora.safetensors"), name.split(".lora_down")[0])


@pytest.mark.parametrize(
    "name",
    [
        "unet.conv_norm_out.weight",
        f"unet.{UNET}.alpha",
        f"unet.{UNET}.lora.alpha",
        "text_encoder_2.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "unet.far_block.to_q.lora_A.weight",
        f"unet.{UNET}.lokr_w1",
    ],
)
def test_a_tensor_beside_a_lora_in_diffusers_layout_is_refused(
    name: str, folder: Path, fused: Callable[..., Any], tmp_path: Path
) -> None:
    state = {**peft_names(folder), name: torch.ones(3, 32) if "lora_A" in name else torch.ones(3)}
    refused(lambda: fused(state), str(tmp_path / "lora.safetensors"), "" if name.endswith(".alpha") else name)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(half: str, folder: Path, fused: Callable[..., Any], tmp_path: Path) -> None:
    state = peft_names(folder)
    del state[f"unet.{OTHER}.{half}.weight"]
    refused(lambda: fused(state), str(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize("half", ["lora_down", "lora_up"])
def test_half_a_pair_of_kohya_is_refused(half: str, folder: Path, fused: Callable[..., Any], tmp_path: Path) -> None:
    state = kohya(folder)
    del state[f"{NAME}.{half}.weight"]
    refused(lambda: fused(state), str(tmp_path / "lora.safetensors"))


@pytest.mark.filterwarnings("default:.*alpha_pattern keys did not match")
def test_a_scale_that_diffusers_would_not_apply_is_refused(folder: Path, fused: Callable[..., Any]) -> None:
    """Different alphas of text encoder layers: diffusers looks for them under the names of older transformers."""
    state = kohya(folder)
    state[f"{KOHYA[TEXT]}.alpha"] = torch.tensor(1.0)
    refused(lambda: fused(state), "alpha_pattern")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_that_is_not_finite_is_refused(value: float, folder: Path, fused: Callable[..., Any]) -> None:
    state = kohya(folder)
    state[f"{NAME}.lora_up.weight"][0, 0] = value
    refused(lambda: fused(state), f"'{NAME}.lora_up.weight'", "NaN")


def test_norms_and_second_text_encoders_of_flux_are_refused(
    tiny_folder: Callable[..., Path], fused: Callable[..., Any]
) -> None:
    folder = tiny_folder("flux")
    width, t5 = 32, "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    layer = "transformer.transformer_blocks.0.attn.to_q"
    lora = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(16)}
    refused(lambda: fused({**lora, **norm}, into=folder), "'transformer.transformer_blocks.0.attn.norm_q.weight'")
    second = {f"{t5}.lora_A.weight": torch.ones(2, width), f"{t5}.lora_B.weight": torch.ones(32, 2)}
    refused(lambda: fused({**lora, **second}, into=folder), f"'{t5}.lora_A.weight'")


def test_a_lora_for_a_component_that_is_not_there_is_refused(
    folder: Path, fused: Callable[..., Any], tmp_path: Path
) -> None:
    opened(folder).components  # noqa: B018
    pipe = DiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "without")
    refused(lambda: fused(kohya(folder), into=tmp_path / "without"), str(tmp_path / "lora.safetensors"))


def test_a_pipeline_whose_text_encoder_lacks_a_tensor_is_refused(fused: Callable[..., Any], tmp_path: Path) -> None:
    folder = tiny_pipeline("sd", tmp_path / "sd")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    state = load_file(file)
    del state["final_layer_norm.bias"]
    save_file(state, file, metadata={"format": "pt"})
    refused(lambda: fused(kohya(folder), into=folder), str(file), "'final_layer_norm.bias' is missing")


def test_a_lora_is_fused_into_a_pipeline_of_a_variant(folder: Path, tmp_path: Path) -> None:
    opened(folder).save_pretrained(tmp_path / "variant", variant="fp16", safe_serialization=True)
    save_file(kohya(folder), tmp_path / "lora.safetensors")
    found = [
        load_checkpoint(fuse_loras(source, [str(tmp_path / "lora.safetensors")], tmp_path / f"fused-{source.name}"))
        for source in (folder, tmp_path / "variant")
    ]
    assert found[0].hash == found[1].hash


def test_nothing_is_printed(folder: Path, fused: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    state, dropped = kohya(folder), {f"{NAME}.dora_scale": torch.ones(OUT, 1)}
    capfd.readouterr()
    refused(lambda: fused({**state, **dropped}), "dora_scale")
    assert capfd.readouterr() == ("", "")
