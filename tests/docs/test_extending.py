"""docs/extending.md: its examples run as they stand, and their places in the tables exist."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from onnx import TensorProto, helper

from diffpress.compress.context import Context
from diffpress.compress.stages import STAGES
from diffpress.export.graph.model import Graph, check_graph
from diffpress.export.lowering import LOWERING
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampler import noise_for, sample
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.solvers import SOLVERS
from diffpress.runtime.solvers.contract import Solver
from tests.compress.conftest import make_unet

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()


def example(path: str) -> Any:
    """Return the module of the example that the page writes to `path`."""
    (code,) = re.findall(rf"```python\n(# {re.escape(path)}\n.*?)```", PAGE, re.DOTALL)
    module = ModuleType(Path(path).stem)
    exec(compile(code, path, "exec"), module.__dict__)
    return module


def test_the_family_names_its_blocks_in_the_order_of_execution() -> None:
    adapter = example("compress/models/families/auraflow.py").ADAPTER
    sizes = {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32}
    model: Any = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, num_mmdit_layers=1, num_single_dit_layers=2, pos_embed_max_size=64, **sizes
    )
    model.eval()
    seen: list[str] = []
    for name in adapter.blocks(model):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3.0, 5.0])}
    inputs |= {"encoder_hidden_states": torch.randn(2, 7, 32), "encoder_attention_mask": torch.ones(2, 7)}
    with torch.no_grad():
        assert adapter.forward(model, inputs).shape == (2, 4, 8, 8)
    assert seen == adapter.blocks(model) != []


def test_the_solver_is_exact_for_an_image_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "dpmpp_2m_heun", Solver(example("runtime/solvers/exact_slope.py").dpmpp_2m_heun))
    schedule, image = betas_schedule("linear", 100), np.full((1, 1, 2, 2), 0.5, np.float32)
    plan = make_plan("dpmpp_2m_heun", 6, schedule)
    noise = noise_for([0], (1, 2, 2))
    *_, last = sample(lambda x, level: image, noise, schedule, plan, lambda k: noise)
    np.testing.assert_allclose(last.x, image, atol=1e-6)


def test_the_stage_rounds_what_is_not_ignored(tmp_path: Path) -> None:
    module, unet = example("compress/bfloat16.py"), make_unet()
    before = dict(unet.model.named_parameters())
    found = module.bfloat16(unet, module.Bfloat16Config(ignored=("conv_in",)), Context(0, tmp_path, unet))
    for name, after in found.model.named_parameters():
        exact = before[name] if name.startswith("conv_in") else before[name].bfloat16().float()
        assert torch.equal(after, exact)
    assert unet.evolve().hash != found.hash


def test_the_pass_removes_identities_and_returns_the_graph_if_there_is_none() -> None:
    drop_identity = example("export/passes/drop_identity.py").drop_identity
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    nodes = [helper.make_node("Identity", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )
    graph = Graph(proto)
    result = drop_identity(graph)
    check_graph(result)
    assert [(node.op_type, *node.input) for node in result.proto.graph.node] == [("Relu", "x")]
    assert drop_identity(result) is result and isinstance(result.proto, onnx.ModelProto)


def test_the_tables_of_the_page_exist() -> None:
    assert "float" in LOWERING and "quantize" in STAGES
    for path in re.findall(r"`((?:compress|export|runtime)/[a-z_/0-9]+\.py)`", PAGE):
        assert (ROOT / "diffpress" / path).is_file(), path
