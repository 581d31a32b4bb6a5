"""runtime/lora/scales.py: the factor of every layer is PEFT's, and settings that change more are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.lora.scales import factor, read_configs

FILE = Path("a.safetensors")
LAYERS = ("block.attn.to_q", "block.attn.to_k", "block.ff")


def of_diffusers(**settings: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_q": 3, "block.ff": 8}, "rank_pattern": {"to_q": 2}},
    ],
)
def test_the_factor_of_a_layer_is_that_of_peft(settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    attention = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8), "to_k": torch.nn.Linear(8, 8)})
    block = torch.nn.ModuleDict({"attn": attention, "ff": torch.nn.Linear(8, 8)})
    model = torch.nn.ModuleDict({"block": block})
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q", "to_k", "ff"], **settings), model)
    (config,) = read_configs(FILE, of_diffusers(**settings), "unet").values()
    for layer in LAYERS:
        module: Any = model.get_submodule(layer)
        assert factor(FILE, config, layer, module.r["default"]) == pytest.approx(module.scaling["default"])


def test_settings_of_peft_lie_in_the_folder_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    assert factor(FILE, read_configs(tmp_path / "adapter_model.safetensors", {}, "unet")["denoiser"], "a", 2) == 4.0
    assert read_configs(tmp_path / "other.safetensors", {}, "unet") == {}
    assert factor(FILE, {}, "a", 2) == 1.0


def test_settings_of_text_encoders_are_their_own() -> None:
    flat = {"unet.lora_alpha": 4, "text_encoder.lora_alpha": 8}
    found = read_configs(FILE, {"lora_adapter_metadata": json.dumps(flat)}, "unet")
    assert found == {"denoiser": {"lora_alpha": 4}, "text_encoder": {"lora_alpha": 8}}


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa"},
        {"alpha_pattern": {"(a+)+": 1}},
        {"alpha_pattern": [1]},
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(settings))):
        read_configs(FILE, of_diffusers(**settings), "unet")


@pytest.mark.parametrize("alpha", ["8", None, True, float("nan"), [1]])
def test_an_alpha_that_is_no_number_is_refused(alpha: Any) -> None:
    with pytest.raises(InvalidInputError, match="lora_alpha"):
        factor(FILE, {"lora_alpha": alpha}, "a", 2)


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_damaged_metadata_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="lora_adapter_metadata"):
        read_configs(FILE, {"lora_adapter_metadata": text}, "unet")
