"""export/passes/cut_graph.py: cached graphs of all families give torch's samples, without weights or inner layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from diffpress.compress.models.adapter import adapter_for, cut_name, dummy_inputs
from diffpress.compress.models.feature_cuts import Cut, split_forward
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.export.graph.model import save_graph
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.passes.cut_graph import cut_graph, write_cached_graph
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.conditioning import Conditioning, TextInput
from diffpress.runtime.engines import available, load_engine
from diffpress.runtime.engines.split import SplitEngine
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import dummy_conditioning
from diffpress.runtime.noise_schedule import betas_schedule, flow_schedule
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

STEPS = ("full", "cached", "cached", "full", "cached")
NOISE, FLOW = betas_schedule("scaled_linear", 1000, 0.00085, 0.012), flow_schedule(1000)


def text(**shapes: tuple[int, ...]) -> Conditioning:
    return Conditioning(
        "text", inputs={name: TextInput(shape, (("text_encoder.out",),)) for name, shape in shapes.items()}
    )


def unet() -> tuple[Any, DenoiserSpec]:
    from diffusers import UNet2DModel

    sizes: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32)}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(**sizes, **kinds, layers_per_block=1, norm_num_groups=4), spec_of("epsilon", (1, 8, 8))


def unet_condition() -> tuple[Any, DenoiserSpec]:
    from tests.pipelines import unet as made

    return made(), spec_of("epsilon", (4, 8, 8), text(encoder_hidden_states=(5, 32)))


def dit() -> tuple[Any, DenoiserSpec]:
    from diffusers import DiTTransformer2DModel

    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8, "num_layers": 4}
    model = DiTTransformer2DModel(
        **sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=4, norm_elementwise_affine=False
    )
    return model, spec_of("epsilon", (4, 8, 8), Conditioning("class", 4, null_label=4))


def pixart() -> tuple[Any, DenoiserSpec]:
    from tests.pipelines import pixart as made

    conditioning = text(encoder_hidden_states=(5, 24), encoder_attention_mask=(5,))
    return made(num_layers=4), spec_of("epsilon", (4, 8, 8), conditioning)


def sd3() -> tuple[Any, DenoiserSpec]:
    from diffusers import SD3Transformer2DModel

    sizes: dict[str, Any] = {"sample_size": 8, "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2}
    widths: dict[str, Any] = {"caption_projection_dim": 32, "joint_attention_dim": 64, "pooled_projection_dim": 24}
    conditioning = text(encoder_hidden_states=(5, 64), pooled_projections=(24,))
    return SD3Transformer2DModel(**sizes, **widths, pos_embed_max_size=12), spec_of("flow", (16, 8, 8), conditioning)


def flux() -> tuple[Any, DenoiserSpec]:
    from diffusers import FluxTransformer2DModel

    sizes: dict[str, Any] = {"in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    widths: dict[str, Any] = {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 24}
    model = FluxTransformer2DModel(**sizes, **widths, guidance_embeds=False, axes_dims_rope=(4, 4, 8))
    return model, spec_of("flow", (16, 8, 8), text(encoder_hidden_states=(5, 32), pooled_projections=(24,)))


MODELS: dict[str, Callable[[], tuple[Any, DenoiserSpec]]] = {
    "UNet2DModel": unet,
    "UNet2DConditionModel": unet_condition,
    "DiT": dit,
    "PixArt": pixart,
    "SD3": sd3,
    "Flux": flux,
}


def spec_of(prediction: str, shape: tuple[int, ...], conditioning: Conditioning | None = None) -> DenoiserSpec:
    schedule = FLOW if prediction == "flow" else NOISE
    plan = make_plan("ddim", len(STEPS), schedule, spacing="trailing")
    return DenoiserSpec(prediction, schedule, shape, plan, conditioning or Conditioning())


def with_cut(model: Any, spec: DenoiserSpec, name: str = "") -> DenoiserSpec:
    return spec.with_plan(replace(spec.plan, cache=StepCache("features", STEPS, cut=cut_name(model, name))))


@pytest.fixture(scope="module", params=MODELS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random network of every family, its cached spec, and its two graphs."""
    torch.manual_seed(0)
    model, spec = MODELS[request.param]()
    model.eval()
    with torch.no_grad():  # zero-initialized layers would hide what the blocks compute
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    spec = with_cut(model, spec)
    graph, folder = to_onnx(model, spec), tmp_path_factory.mktemp("cut")
    whole, cached = folder / "denoiser.onnx", folder / "denoiser.cached.onnx"
    save_graph(graph, whole, data="denoiser.onnx.data")
    features = [value.name for value in graph.proto.graph.output][1:]
    write_cached_graph(whole, cached, features)
    return model, spec, whole, cached, tuple(features)


def test_cached_samples_of_every_engine_are_those_of_torch(written: Any) -> None:
    model, spec, whole, cached, features = written
    conditions = dummy_conditioning(spec, 3)
    network = TorchNetwork(model, spec)
    plans = (spec.plan, spec.plan.without_cache)
    expected, uncached = (generate(network, spec, range(3), plan=p, conditions=conditions) for p in plans)
    assert np.abs(expected - uncached).max() > 1e-3
    for name in (name for name in available() if name != "tensorrt"):
        with ExitStack() as stack:
            full, outer = (stack.enter_context(closing(load_engine(path, name, 1))) for path in (whole, cached))
            engine = SplitEngine(full, outer, features)
            found, plain = (generate(engine, spec, range(3), plan=p, conditions=conditions) for p in plans)
            all_full = replace(spec.plan, cache=StepCache("features", ("full",) * 5, cut=spec.plan.cache.cut))
            assert np.array_equal(generate(engine, spec, range(3), plan=all_full, conditions=conditions), plain)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3, err_msg=name)
        np.testing.assert_allclose(plain, uncached, rtol=0, atol=1e-3, err_msg=name)


def test_the_cached_graph_stores_no_large_weight_and_has_no_inner_layer(written: Any) -> None:
    model, spec, whole, cached, features = written
    before, after = (onnx.load(path, load_external_data=False) for path in (whole, cached))
    assert {entry.value for t in after.graph.initializer for entry in t.external_data if entry.key == "location"} == {
        "denoiser.onnx.data"
    }
    cut = adapter_for(model).cache_cuts(model)[spec.plan.cache.cut]
    inner = "mid_block." if not cut.start else f"{cut.start}."
    names = [{node.name for node in proto.graph.node if node.name.startswith(inner)} for proto in (before, after)]
    # the block's modulation may be computed with those of all blocks; its products are gone
    assert names[0] and not names[1]
    assert set(features) < {value.name for value in after.graph.input}


def test_a_cut_that_leaves_nothing_out_is_refused(written: Any) -> None:
    _, _, _whole, cached, _features = written
    proto = onnx.load(cached, load_external_data=False)
    output = proto.graph.output[0].name
    identity = onnx.helper.make_node("Identity", ["sample"], ["feature.9"])
    value = onnx.ValueInfoProto()
    value.CopyFrom(proto.graph.input[0])
    value.name = "feature.9"
    proto.graph.node.append(identity)
    proto.graph.output.append(value)
    assert proto.graph.output[0].name == output
    with pytest.raises(InvalidInputError, match="leaves no layer out"):
        cut_graph(proto, ["feature.9"])


def test_graphs_that_do_not_belong_together_are_refused(written: Any) -> None:
    _, _, whole, _cached, features = written
    with closing(load_engine(whole, "onnxruntime", 1)) as full, pytest.raises(InvalidInputError, match="do not match"):
        SplitEngine(full, full, features)


def test_with_its_own_features_a_network_gives_its_own_output() -> None:
    for make in MODELS.values():
        torch.manual_seed(1)
        model, spec = make()
        forward, inputs = adapter_for(model.eval()).forward, dummy_inputs(spec, 2)
        for cut in adapter_for(model).cache_cuts(model).values():
            with torch.no_grad():
                plain = forward(model, inputs)
                out, *features = split_forward(model, forward, cut, inputs)
                again, *_ = split_forward(model, forward, cut, inputs, features)
                other, *_ = split_forward(model, forward, cut, inputs, [2.0 * f for f in features])
            assert len(features) == len(cut.arguments)
            torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(again, out, rtol=0, atol=0)
            assert (other - out).abs().max() > 1e-6


def test_a_cut_that_the_family_does_not_have_is_refused_with_those_it_has() -> None:
    model, _ = unet()
    with pytest.raises(InvalidInputError, match=r"cut 'up_blocks.7' is not one of up_blocks.1, which this UNet2DModel"):
        cut_name(model, "up_blocks.7")
    with pytest.raises(InvalidInputError, match=r"this Linear has no cut; use kind 'forecast'.*UNet2DModel, .*Flux"):
        cut_name(torch.nn.Linear(2, 2))
    assert Cut("a", "b", ("x", "y")).features == ["feature.0", "feature.1"]
