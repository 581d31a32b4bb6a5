"""Users' files: their neighbours, what `load` may return, and what the module must do; each refusal is one line."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import ANY_MODULE, adapter_for
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError

HEAD = """
import torch
from torch import nn
from diffpress import Conditioning, DenoiserSpec, TensorInput, betas_schedule, make_plan

schedule = betas_schedule("linear", 50)


def spec(shape=(1, 8, 8), clip=True, guidance=1.0, **settings):
    plan = make_plan("ddim", 3, schedule, clip=clip, guidance=guidance)
    return DenoiserSpec("epsilon", schedule, shape, plan, **settings)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, sample, timestep):
        x = self.conv(sample)
        return OUTPUT

"""


def loaded(folder: Path, text: str, name: str = "mine.py") -> Checkpoint:
    """Load a file with this text and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / "weights").write_bytes(b"")
    return load_checkpoint(f"{folder / name}:{folder / 'weights'}")


def model(output: str = "x", returned: str = "Model(), spec()") -> str:
    return HEAD.replace("OUTPUT", output) + f"def load(path):\n    return {returned}\n"


def refused(folder: Path, text: str) -> str:
    with pytest.raises(InvalidInputError) as caught:
        loaded(folder, text)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- neighbours ------------------------------------------------------------------------------------------------


def scaled(folder: Path, scale: float) -> Checkpoint:
    """A model that multiplies by a constant, which is in a package beside its file."""
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "scale.py").write_text("from common import SCALE\n")
    (folder / "common.py").write_text(f"SCALE = {scale}\n")
    text = "from parts.scale import SCALE\n" + model("x * 0 + SCALE")
    return loaded(folder, text)


def test_neighbours_of_the_same_name_in_two_folders_are_not_confused(tmp_path: Path) -> None:
    path = list(sys.path)
    outputs = []
    for folder, scale in (("a", 2.0), ("b", 3.0), ("c", 4.0)):
        checkpoint = scaled(tmp_path / folder, scale)
        with torch.no_grad():
            outputs.append(float(checkpoint.model(torch.zeros(1, 1, 8, 8), torch.zeros(1)).mean()))
    assert outputs == [2.0, 3.0, 4.0]
    assert sys.path == path and not {"common", "parts", "parts.scale"} & set(sys.modules)


def test_a_neighbour_comes_before_an_imported_module_of_that_name_which_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "common.py").write_text("SCALE = 9.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    other = __import__("common")
    try:
        checkpoint = scaled(tmp_path / "mine", 2.0)
        with torch.no_grad():
            assert float(checkpoint.model(torch.zeros(1, 1, 8, 8), torch.zeros(1)).mean()) == 2.0
        assert sys.modules["common"] is other
    finally:
        del sys.modules["common"]


def test_a_failed_import_leaves_no_traces(tmp_path: Path) -> None:
    path = list(sys.path)
    (tmp_path / "broken.py").write_text("VALUE = 1\nVALUE / 0\n")
    message = refused(tmp_path, "import broken\n" + model())
    assert "broken.py:2: importing it failed: ZeroDivisionError" in message
    assert sys.path == path and "broken" not in sys.modules


def test_a_file_with_a_dataclass_and_postponed_annotations_loads(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Config:\n    width: int = 4\n\n\n"
    )
    assert loaded(tmp_path, text + model()).spec.sample_shape == (1, 8, 8)


def test_what_a_file_does_to_torch_is_undone(tmp_path: Path) -> None:
    text = "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n" + model()
    checkpoint = loaded(tmp_path, text)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert {parameter.dtype for parameter in checkpoint.model.parameters()} == {torch.float32}


# --- what load returns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ("Model()", "it returns Model"),
        ("spec(), Model()", "it returns DenoiserSpec, Model"),
        ("Model(), spec(), None", "it returns Model, DenoiserSpec, NoneType"),
        ("Model(), spec(), Model(), 1", "it returns Model, DenoiserSpec, Model, int"),
        ("[Model(), spec()]", "it returns list"),
        ("Model, spec()", "it returns type, DenoiserSpec"),
        ("()", "it returns an empty tuple"),
        ("None", "it returns NoneType"),
    ],
)
def test_other_return_values_of_load_are_refused(returned: str, found: str, tmp_path: Path) -> None:
    message = refused(tmp_path, model(returned=returned))
    assert "load(path) must return (torch.nn.Module, DenoiserSpec)" in message and message.endswith(found)


@pytest.mark.parametrize("text", ["", "load = 3\n", "from diffpress import *\n"])
def test_a_file_without_load_is_refused(text: str, tmp_path: Path) -> None:
    assert refused(tmp_path, text).endswith("mine.py: defines no function load(path)")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("def load(:\n", "mine.py:1: importing it failed: SyntaxError"),
        ("import no_such_module\n", "mine.py:1: importing it failed: ModuleNotFoundError"),
        ("def build():\n    return 1 / 0\n\n\ndef load(path):\n    return build()\n", "mine.py:2: load("),
        ("def load(path):\n    raise SystemExit(3)\n", "failed: SystemExit: 3"),
        ("def load(path):\n    raise ValueError('a\\nb')\n", "mine.py:2: load("),
        (model(returned="Model(), spec((0, 8, 8))"), "failed: sample shape (0, 8, 8) must have 1 to 4 sizes"),
    ],
)
def test_an_error_in_the_users_code_names_its_file_and_line(text: str, place: str, tmp_path: Path) -> None:
    assert place in refused(tmp_path, text)


def test_a_module_in_half_precision_or_frozen_or_training_is_made_right(tmp_path: Path) -> None:
    for change in ("half()", "double()", "requires_grad_(False)", "train()"):
        checkpoint = loaded(tmp_path, model(returned=f"Model().{change}, spec()"))
        parameters = list(checkpoint.model.parameters())
        assert {p.dtype for p in parameters} == {torch.float32} and all(p.requires_grad for p in parameters)
        assert not any(module.training for module in checkpoint.model.modules())


def test_weights_without_values_are_refused_by_name(tmp_path: Path) -> None:
    assert "tensor 'conv.weight' has no values" in refused(tmp_path, model(returned="Model().to('meta'), spec()"))


# --- what the module returns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("(x,)", "the module returns a tuple; return one tensor [2, 1, 8, 8]"),
        ("{'sample': x}", "the module returns a dict"),
        ("x.double()", "the module returns float64; return float32"),
        ("x.half()", "the module returns float16; return float32"),
        ("x > 0", "the module returns bool"),
        ("x[:, :, :4]", "the module returns [2, 1, 4, 8]"),
        ("torch.cat([x, x], 1)", "the module returns [2, 2, 8, 8]"),
        ("x.sum()", "the module returns []"),
        ("x * float('nan')", "returns NaN or infinite values"),
        ("x / 0", "returns NaN or infinite values"),
        ("nn.functional.dropout(x, 0.5, True)", "returns different values for the same sample"),
        ("x + torch.rand(())", "returns different values for the same sample"),
        ("x - x.mean(0)", "returns different values for the same sample"),
        (
            "self.missing(x)",
            "mine.py:21: the module, called with sample float32 [2, 1, 8, 8], timestep int64 [2], failed",
        ),
    ],
)
def test_a_module_that_does_something_else_is_refused_when_it_is_loaded(
    output: str, found: str, tmp_path: Path
) -> None:
    assert found in refused(tmp_path, model(output))


def test_dropout_layers_are_off(tmp_path: Path) -> None:
    checkpoint = loaded(tmp_path, model(returned="Dropping(), spec()") + DROPPING)
    x = torch.ones(1, 1, 8, 8)
    assert torch.equal(checkpoint.model(x, torch.zeros(1)), x)


DROPPING = """

class Dropping(Model):
    def forward(self, sample, timestep):
        return nn.functional.dropout(sample, 0.5, self.training)
"""


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ("Model(), spec(guidance=3.0)", "the model is not conditional; use guidance 1"),
        (
            "Model(), spec(conditioning=Conditioning('tensors', tensors={'a': TensorInput((2,))}), guidance=3.0)",
            "guidance needs a tensor with a null",
        ),
        (
            "Model(), spec(conditioning=Conditioning('class', classes=2))",
            "takes 3 positional arguments but 4 were given",
        ),
        (
            "Model(), spec(conditioning=Conditioning('tensors', tensors={'seen': TensorInput((2,))}))",
            "called with sample float32 [2, 1, 8, 8], timestep int64 [2], seen float32 [2, 2], failed: TypeError",
        ),
        (
            "Model(), spec(conditioning=Conditioning('tensors', tensors={'sample': TensorInput((2,))}))",
            "the tensor name 'sample' must be a Python name other than sample",
        ),
    ],
)
def test_conditioning_and_guidance_that_do_not_fit_are_refused(returned: str, found: str, tmp_path: Path) -> None:
    assert found in refused(tmp_path, model(returned=returned))


@pytest.mark.parametrize(
    ("decoder", "found"),
    [
        ("nn.Upsample(scale_factor=2)", "the decoder returns 16x16 images, but latents [1, 8, 8] with latent_factor 4"),
        ("nn.Conv2d(3, 3, 1)", "the decoder, called with latents float32 [2, 1, 8, 8], failed: RuntimeError"),
        ("nn.Flatten(0)", "the decoder returns [128]"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(decoder: str, found: str, tmp_path: Path) -> None:
    assert found in refused(tmp_path, model(returned=f"Model(), spec(latent_factor=4, clip=False), {decoder}"))


def test_a_plan_that_clips_latents_to_the_range_of_pixels_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded(tmp_path, model(returned="Model(), spec(latent_factor=4)"))
    assert "the plan clips latents to (-1.0, 1.0)" in caplog.text


def test_a_class_that_is_named_like_one_of_diffusers_is_not_taken_for_it(tmp_path: Path) -> None:
    text = model().replace("Model", "DiTTransformer2DModel")
    assert adapter_for(loaded(tmp_path, text).model) is ANY_MODULE


def test_the_hash_covers_the_decoder(tmp_path: Path) -> None:
    text = model(returned="torch.manual_seed(0) and Model(), spec(clip=False), Model().conv")
    first, again = loaded(tmp_path / "a", text), loaded(tmp_path / "b", text)
    assert first.hash == again.hash and first.source.decoder is not None
    with torch.no_grad():
        next(first.source.decoder.parameters()).add_(1.0)
    assert first.evolve().hash != again.hash
