"""TensorRT-RTX engines built without a GPU: their targets, sizes, and rejected options."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from diffpress.cli.export import add_tensorrt_arguments, build_options
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import TensorRTConfig
from diffpress.compress.recipe import Recipe
from diffpress.compress.sources.load import load_checkpoint
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.passes.half_precision import kept_modules, to_half
from diffpress.export.targets.tensorrt import build_engine, build_engines
from diffpress.runtime.bundle import load_bundle, sha256
from diffpress.runtime.engines.tensorrt.compatibility import incompatibility
from diffpress.runtime.engines.tensorrt.library import Device
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError
from tests.export.oracle import exported, quantized_graph
from tests.export.targets.test_capability import calibrated

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: no engine was built here"
)
SIZES = ("8.6", "8.9", "12.0")


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> bool:
    return "\n" not in str(caught.value)


def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpress.runtime.engines.tensorrt.library.MODULES", {"tensorrt-rtx": "no_such_module_at_all"})


def test_without_tensorrt_the_extra_is_named_before_any_work(
    wide: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_installed(monkeypatch)
    monkeypatch.setattr("diffpress.export.denoiser.to_onnx", lambda *_: pytest.fail("traced before the check"))
    with pytest.raises(MissingDependencyError, match=r"tensorrt-rtx.*pip install 'diffpress\[tensorrt\]'"):
        exported(wide, tmp_path / "b", ["tensorrt"], capabilities=["8.9"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], BuildOptions()),
        (
            ["--batch", "2", "4", "8", "--sizes", "256x256", "512x768", "--workspace-mib", "64", "--strip-weights"],
            BuildOptions((2, 4, 8), ((256, 256), (512, 768)), workspace_mib=64, strip_weights=True),
        ),
        (["--optimization-level", "5", "--tf32"], BuildOptions(optimization_level=5, tf32=True)),
    ],
)
def test_flags_become_options(flags: list[str], expected: BuildOptions) -> None:
    parser = argparse.ArgumentParser()
    add_tensorrt_arguments(parser)
    assert build_options(parser.parse_args(flags)) == expected


@needs_tensorrt
def test_an_engine_is_built_without_a_gpu_and_its_entry_records_the_target(
    wide: Checkpoint, wide_graph: Graph, tmp_path: Path
) -> None:
    save_graph(wide_graph, tmp_path / "g.onnx")
    entry = build_engine(tmp_path / "g.onnx", tmp_path, ["8.6", "12.0"], wide.spec, BuildOptions(batch=(1, 2, 4)))
    engine = tmp_path / entry["file"]
    assert entry["file"] == "engines/tensorrt/denoiser_sm86_sm120.engine" and entry["library"] == "tensorrt-rtx"
    assert engine.stat().st_size == entry["bytes"] > 100_000 and sha256(engine) == entry["sha256"]
    assert entry["graph_sha256"] == sha256(tmp_path / "g.onnx") and entry["build_seconds"] > 0
    assert entry["profile"]["sample"] == [[1, 1, 8, 8], [2, 1, 8, 8], [4, 1, 8, 8]]
    assert BuildOptions.from_json(entry["options"], "x") == BuildOptions(batch=(1, 2, 4))
    here = Device("12.0", {"tensorrt-rtx": entry["version"]})
    assert incompatibility(entry, here, entry["graph_sha256"]) is None
    reason = incompatibility(entry, Device("8.9", here.libraries), entry["graph_sha256"])
    assert reason is not None and "capability 8.6, 12.0, and this GPU has 8.9" in reason


@needs_tensorrt
@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(tf32=True),
        BuildOptions(sparse_weights=True),
        BuildOptions(stream_weights=True),
        BuildOptions(optimization_level=0),
        BuildOptions(workspace_mib=64),
    ],
)
def test_each_option_builds(options: BuildOptions, wide: Checkpoint, wide_graph: Graph, tmp_path: Path) -> None:
    save_graph(wide_graph, tmp_path / "g.onnx")
    entry = build_engine(tmp_path / "g.onnx", tmp_path, ["8.9"], wide.spec, options)
    assert entry["options"] == options.to_json() and entry["bytes"] > 100_000


@needs_tensorrt
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(version_compatible=True), "tensorrt-rtx has no version-compatible engines"),
        (BuildOptions(hardware_compatible="ampere_plus"), "tensorrt-rtx has no hardware compatibility levels"),
        (BuildOptions(strip_weights=True), "tensorrt-rtx needs a GPU to build an engine without weights"),
        (BuildOptions(sizes=((8, 8), (16, 16))), "this graph has a fixed height and width"),
    ],
)
def test_options_that_cannot_be_built_are_rejected_in_one_line(
    options: BuildOptions, message: str, wide: Checkpoint, tmp_path: Path
) -> None:
    save_graph(to_onnx(wide.model, wide.spec, fixed_size=True), tmp_path / "g.onnx")
    with pytest.raises(InvalidInputError, match=message) as caught:
        build_engine(tmp_path / "g.onnx", tmp_path, ["8.9"], wide.spec, options)
    assert one_line(caught) and not (tmp_path / "engines").exists()


@needs_tensorrt
@pytest.mark.parametrize(
    ("capabilities", "message"), [([], "name the GPUs"), (["8.7"], "unknown compute capability '8.7': did you mean '8")]
)
def test_capabilities_that_cannot_be_built_for_are_rejected(
    capabilities: Sequence[str], message: str, wide: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build_engine(tmp_path / "g.onnx", tmp_path, capabilities, wide.spec)


@needs_tensorrt
def test_a_node_that_tensorrt_does_not_support_is_named_in_one_line(wide: Checkpoint, tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    node = helper.make_node("Nonsense", ["x"], ["y"], "the_node", domain="ours")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ours", 1)]
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "g.onnx")
    with pytest.raises(
        InvalidInputError, match=r"g.onnx: tensorrt-rtx cannot parse node 'the_node' \(Nonsense\).*no such operator"
    ) as caught:
        build_engine(tmp_path / "g.onnx", tmp_path, ["8.9"], wide.spec)
    assert one_line(caught)


@needs_tensorrt
def test_a_graph_made_for_cpus_is_rejected_with_advice(unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    save_graph(quantized_graph(unet_graph, calibrated(unet, "int8")), tmp_path / "g.onnx")
    with pytest.raises(
        InvalidInputError, match=r"cannot parse node '.*' .*zero point.*export with --targets tensorrt"
    ) as caught:
        build_engine(tmp_path / "g.onnx", tmp_path, ["8.9"], unet.spec)
    assert one_line(caught)


@needs_tensorrt
def test_the_builder_also_rejects_fp8_on_a_gpu_without_it(unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    save_graph(quantized_graph(unet_graph, calibrated(unet, "fp8"), tensorrt=True), tmp_path / "g.onnx")
    message = r"compute capability 8.6 does not run format fp8 .*8.9 and later do: omit 8.6, or quantize to int8"
    with pytest.raises(InvalidInputError, match=message) as caught:
        build_engine(tmp_path / "g.onnx", tmp_path, ["8.6", "8.9"], unet.spec)
    assert one_line(caught)


class Heavy(nn.Module):
    """Nine tenths of the computation are two convolutions of 2.4 million weights each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 512, 3, padding=1)
        self.a, self.b = nn.Conv2d(512, 512, 3, padding=1), nn.Conv2d(512, 512, 3, padding=1)
        self.last = nn.Conv2d(512, 1, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.last(self.b(torch.tanh(self.a(torch.tanh(self.first(sample)))))) * timestep[:, None, None, None]


@needs_tensorrt
def test_an_engine_stores_weights_in_the_precision_of_the_graph(wide: Checkpoint, tmp_path: Path) -> None:
    """Engines also contain kernels, more of them for int8, whose engine may be larger for a small network."""
    torch.manual_seed(3)
    heavy = wide.evolve(model=Heavy().eval(), source=replace(wide.source, original={}))
    graph = to_onnx(heavy.model, heavy.spec)
    half, _ = to_half(graph, "fp16", kept_modules(heavy.model, "fp16"))
    rounded = quantized_graph(graph, calibrated(heavy, "int8"), tensorrt=True)
    sizes = {}
    for kind, source in {"fp32": graph, "fp16": half, "int8": rounded}.items():
        save_graph(source, tmp_path / f"{kind}.onnx")
        sizes[kind] = build_engine(tmp_path / f"{kind}.onnx", tmp_path / kind, ["8.9"], heavy.spec)["bytes"]
    weights = 2 * 512 * 512 * 9
    assert sizes["int8"] < 0.7 * sizes["fp16"] < 0.49 * sizes["fp32"], sizes
    for kind, width in {"fp32": 4, "fp16": 2, "int8": 1}.items():
        assert 0 < sizes[kind] - width * weights < 1.5e6, sizes


@needs_tensorrt
@pytest.mark.slow
def test_bundles_contain_engines_that_the_runtime_finds(unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "capabilities": SIZES,
        "build": BuildOptions(batch=(1, 2, 4)),
        "float_graph": unet_graph,
        "threads": 1,
    }
    quantized = unet.evolve(quantization=calibrated(unet, "int8", weight_range=127 / 64))
    for checkpoint, precision, source in ((unet, "fp32", "denoiser"), (quantized, "int8", "denoiser.tensorrt")):
        bundle = exported(checkpoint, tmp_path / precision, ["tensorrt"], **options)
        ((file, entry),) = bundle.prebuilt_engines("denoiser", "tensorrt")
        assert file.is_file() and entry["precision"] == precision and entry["graph"] == f"{source}.onnx"
        assert entry["compute_capabilities"] == list(SIZES)


@needs_tensorrt
@pytest.mark.slow
def test_all_graphs_of_a_latent_pipeline_are_built(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(tiny_folder("sd")))
    build = BuildOptions(batch=(1, 2, 4), sizes=((16, 16), (64, 64)))
    bundle = exported(checkpoint, tmp_path / "b", ["tensorrt"], capabilities=SIZES, build=build, threads=1)
    graphs = ["denoiser", "text_encoder", "vae_decoder"]
    entries = {graph: bundle.prebuilt_engines(graph, "tensorrt")[0].entry for graph in graphs}
    low, optimum, high = entries["denoiser"]["profile"]["sample"]
    own = list(checkpoint.spec.sample_shape)
    factor = checkpoint.spec.latent_factor
    assert (low, optimum, high) == (
        [1, own[0], 16 // factor, 16 // factor],
        [2, *own],
        [4, own[0], 64 // factor, 64 // factor],
    )
    assert entries["vae_decoder"]["profile"]["latent_sample"][2][0] == 1
    # another bundle of this pipeline reuses unchanged engines
    sources = {graph: (bundle.graph(graph), "fp32") for graph in graphs[1:]}
    reused = build_engines(tmp_path / "other", sources, SIZES, checkpoint.spec, build, load_bundle(tmp_path / "b"))
    assert reused == [entries[graph] for graph in graphs[1:]]
    assert (tmp_path / "other" / reused[0]["file"]).samefile(tmp_path / "b" / reused[0]["file"])


@needs_tensorrt
@pytest.mark.slow
def test_the_teachers_engines_shrink_with_their_weights(tmp_path: Path) -> None:
    """For three GPUs: int8 and fp16 below fp32, fp8 where the GPU supports it. Run with -s for the bytes."""
    teacher = load_checkpoint("calib_data/teacher")
    graph = to_onnx(teacher.model, teacher.spec)
    half, _ = to_half(graph, "fp16", kept_modules(teacher.model, "fp16"))
    graphs = {"fp32": graph, "fp16": half}
    for kind in ("int8", "fp8"):
        rounded = quantized_graph(graph, calibrated(teacher, kind), tensorrt=True)
        graphs[kind], _ = to_half(rounded, "fp16", kept_modules(teacher.model, "fp16"))
    sizes = {}
    for kind, source in graphs.items():
        save_graph(source, tmp_path / f"{kind}.onnx")
        for capability in [one for one in SIZES if kind != "fp8" or one != "8.6"]:
            entry = build_engine(tmp_path / f"{kind}.onnx", tmp_path / kind, [capability], teacher.spec)
            sizes[kind, capability] = entry["bytes"]
            print(f"{kind} {capability}: {entry['bytes']} bytes, {entry['build_seconds']} s")  # noqa: T201
    for capability in SIZES:
        # kernels are more than half of these engines, and int8 has more of them than fp16
        assert sizes["int8", capability] < 0.8 * sizes["fp32", capability]
        assert sizes["fp16", capability] < 0.7 * sizes["fp32", capability]


def test_a_recipe_sets_the_build_options(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "export: {targets: [tensorrt], tensorrt: {compute_capabilities: ['8.6', '8.9'], batch: [1, 2, 4], tf32: true}}"
    )
    config = Recipe.load(tmp_path / "r.yaml").export.tensorrt
    assert config.compute_capabilities == ("8.6", "8.9")
    assert config.options == BuildOptions(batch=(1, 2, 4), tf32=True)
    assert TensorRTConfig().options == BuildOptions()
    # a recipe's keys are the options, of the same types and with the same defaults
    assert set(TensorRTConfig.model_fields) - {"compute_capabilities"} == {f.name for f in fields(BuildOptions)}
    types = get_type_hints(BuildOptions)
    assert {name: get_type_hints(TensorRTConfig)[name] for name in types} == types


@pytest.mark.parametrize(
    ("settings", "message"),
    [("{batch: [4, 2, 1]}", "batch 4 2 1: expected the smallest"), ("{bach: [1, 2, 4]}", "did you mean 'batch'")],
)
def test_a_recipe_that_cannot_be_built_is_rejected_with_its_path(settings: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"export: {{targets: [tensorrt], tensorrt: {settings}}}")
    with pytest.raises(InvalidInputError, match=rf"r.yaml: .*export.tensorrt.*{message}"):
        Recipe.load(tmp_path / "r.yaml")


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "capabilities"), [("int8", SIZES), ("fp8", SIZES[1:])])
def test_a_quantized_latent_denoiser_is_built_with_dynamic_sizes(
    kind: str, capabilities: Sequence[str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(str(tiny_folder("sd")))
    graph = quantized_graph(to_onnx(checkpoint.model, checkpoint.spec), calibrated(checkpoint, kind), tensorrt=True)
    save_graph(graph, tmp_path / "g.onnx")
    options = BuildOptions(batch=(1, 2, 4), sizes=((16, 16), (64, 64)))
    entry = build_engine(tmp_path / "g.onnx", tmp_path, capabilities, checkpoint.spec, options, precision=kind)
    print(f"{kind} for {capabilities}: {entry['bytes']} bytes, {entry['build_seconds']} s")  # noqa: T201
    low, _, high = entry["profile"]["sample"]
    assert low[2:] < high[2:] and entry["profile"]["encoder_hidden_states"][0][1:] == [16, 32]
