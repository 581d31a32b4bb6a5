"""runtime/lora/names.py: stems of the published layouts; the original names of a U-Net as diffusers maps them back."""

from __future__ import annotations

import pytest

from diffpress.runtime.lora.names import ALPHA, DOWN, RESNET, UP, split_name, stability_names, stems

SPLIT = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": ("lora_unet_mid_block_attentions_0_proj_in", DOWN),
    "lora_te1_text_model_final.alpha": ("lora_te1_text_model_final", ALPHA),
    "unet.a.to_q.lora_A.weight": ("unet.a.to_q", DOWN),
    "base_model.model.a.to_q.lora_B.weight": ("a.to_q", UP),
    "base_model.model.a.to_q.lora_B.default.weight": ("a.to_q", UP),
    "unet.a.to_q.lora.up.weight": ("unet.a.to_q", UP),
    "text_encoder.a.q_proj.lora_linear_layer.up.weight": ("text_encoder.a.q_proj", UP),
    "unet.a.attn1.processor.to_out_lora.down.weight": ("unet.a.attn1.processor.to_out", DOWN),
}


@pytest.mark.parametrize("name", SPLIT)
def test_a_tensor_name_is_a_stem_and_a_suffix(name: str) -> None:
    assert split_name(name) == SPLIT[name]


@pytest.mark.parametrize("name", ["a.weight", "a.lora_mid.weight", "a.hada_w1_a", "a.dora_scale", "a.diff_b", "alpha"])
def test_other_tensors_are_no_part_of_a_lora(name: str) -> None:
    assert split_name(name) is None


def test_a_layer_has_a_stem_in_every_layout() -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    text = "encoder.layers.1.self_attn.q_proj"
    found = stems("unet", [layer], {"text_encoder": [text], "text_encoder_2": [f"text_model.{text}"]})
    of_layer = {stem for stem, target in found.items() if target == ("denoiser", layer)}
    assert of_layer == {
        layer,
        f"unet.{layer}",
        "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0",
    }
    assert found["lora_te_text_model_encoder_layers_1_self_attn_q_proj"] == ("text_encoder", text)
    assert found["lora_te1_text_model_encoder_layers_1_self_attn_q_proj"] == ("text_encoder", text)
    second = ("text_encoder_2", f"text_model.{text}")
    assert found["lora_te2_text_model_encoder_layers_1_self_attn_q_proj"] == second
    assert found[f"text_encoder_2.{text}"] == found[f"text_encoder_2.text_model.{text}"] == second


def test_original_names_of_an_sdxl_unet_are_those_that_diffusers_maps_to_its_own() -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            use_linear_projection=True,
            cross_attention_dim=64,
        )
    layers = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and (".attentions." in name or ".resnets." in name)
    ]
    names = stability_names(layers)
    assert names.keys() == set(layers) and len(set(names.values())) == len(layers)
    state = {f"lora_unet_{name.replace('.', '_')}": torch.zeros(1) for name in names.values()}
    mapped = _maybe_map_sgm_blocks_to_diffusers(state, unet.config)
    # it leaves the outermost names, and those of a residual block's layers, to a later function
    expected = set()
    for layer in layers:
        block, _, own = layer.rpartition(".")
        own = RESNET.get(own, own) if ".resnets." in layer else own
        for ours, theirs in (("down_blocks", "input_blocks"), ("up_blocks", "output_blocks"), ("mid", "middle")):
            block = block.replace(ours, theirs)
        expected.add(f"lora_unet_{block}.{own}".replace(".", "_"))
    assert set(mapped) == expected
