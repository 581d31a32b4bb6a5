"""Selection of TensorRT engines: manifest entries checked against the machine, without a GPU or the library."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffpress.runtime.bundle import Bundle, PrebuiltEngine, load_bundle
from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput
from diffpress.runtime.engines import load_engine
from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.engines.tensorrt import engine as tensorrt_engine
from diffpress.runtime.engines.tensorrt.builder import choose, graph_sha256
from diffpress.runtime.engines.tensorrt.compatibility import incompatibility, uncovered
from diffpress.runtime.engines.tensorrt.engine import reasons
from diffpress.runtime.engines.tensorrt.engine_files import engine_for
from diffpress.runtime.engines.tensorrt.library import Device
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.engines.tensorrt.profile import profile_shapes
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError, MissingDependencyError

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: no engine was built"
)
HERE = Device("8.9", {"tensorrt-rtx": "1.7.1", "tensorrt": "10.9.0"})


def entry_of(**changes: Any) -> dict[str, Any]:
    return {
        "engine": "tensorrt",
        "library": "tensorrt-rtx",
        "version": "1.7.1",
        "graph": "denoiser.onnx",
        "graph_sha256": "g",
        "file": "engines/tensorrt/denoiser_sm89.engine",
        "sha256": hashlib.sha256(b"data").hexdigest(),
        "compute_capabilities": ["8.6", "8.9"],
        "profile": {"sample": [[1, 3, 8, 8], [8, 3, 8, 8], [64, 3, 8, 8]]},
        "options": BuildOptions().to_json(),
        **changes,
    }


def test_an_engine_for_this_machine_is_compatible() -> None:
    assert incompatibility(entry_of(), HERE, "g") is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "1.6.0"}, "built with tensorrt-rtx 1.6.0, and 1.7.1 is installed"),
        ({"library": "tensorrt", "version": "10.8.0"}, "built with tensorrt 10.8.0, and 10.9.0 is installed"),
        ({"compute_capabilities": ["8.6", "12.0"]}, "built for compute capability 8.6, 12.0, and this GPU has 8.9"),
        ({"graph_sha256": "other"}, "built from another denoiser.onnx than the present one"),
        ({"profile": {"sample": [[1], [2, 3], [4]]}}, "its entry in the manifest is incomplete"),
        ({"compute_capabilities": "8.9"}, "its entry in the manifest is incomplete"),
        ({"sha256": None}, "its entry in the manifest is incomplete"),
    ],
)
def test_an_incompatible_engine_gives_the_reason(changes: dict[str, Any], reason: str) -> None:
    found = incompatibility(entry_of(**changes), HERE, "g")
    assert found is not None and reason in found


def test_a_missing_library_is_named() -> None:
    other = Device("8.9", {"tensorrt": "10.9.0"})
    found = incompatibility(entry_of(), other, "g")
    assert found is not None and "tensorrt-rtx 1.7.1, which is not installed" in found


@pytest.mark.parametrize(
    ("built", "fits"), [("10.8.2", True), ("10.10.0", False), ("9.9.0", False), ("10.9.0", True), ("x", False)]
)
def test_version_compatible_engines_run_only_in_later_versions(built: str, fits: bool) -> None:
    options = BuildOptions(version_compatible=True).to_json()
    entry = entry_of(library="tensorrt", version=built, options=options)
    assert (incompatibility(entry, HERE, "g") is None) == fits


def test_hardware_compatible_engines_run_on_ampere_and_later() -> None:
    options = BuildOptions(hardware_compatible="ampere_plus").to_json()
    entry = entry_of(compute_capabilities=["8.0"], options=options)
    assert incompatibility(entry, HERE, "g") is None
    assert incompatibility(entry, Device("7.5", HERE.libraries), "g") is not None


def test_shapes_outside_the_profile_are_named() -> None:
    profile = entry_of()["profile"]
    assert uncovered(profile, {"sample": (64, 3, 8, 8)}) is None
    assert uncovered(profile, {"sample": (2, 3, 16, 8)}) == (
        "sample must be between 1x3x8x8 and 64x3x8x8, got 2x3x16x8"
    )


@pytest.fixture
def bundle(tiny: Path) -> Bundle:
    return load_bundle(tiny)


@pytest.fixture
def graph(bundle: Bundle) -> Path:
    return bundle.denoiser


def built(tmp_path: Path, graph: Path, content: bytes = b"data", **changes: Any) -> PrebuiltEngine:
    (tmp_path / "a.engine").write_bytes(content)
    return PrebuiltEngine(tmp_path / "a.engine", entry_of(graph_sha256=graph_sha256(graph), **changes))


def test_of_several_engines_the_compatible_one_is_used(tmp_path: Path, graph: Path) -> None:
    wrong, right = built(tmp_path, graph, compute_capabilities=["12.0"]), built(tmp_path, graph)
    data, entry = engine_for(graph, EngineOptions(), [wrong, right], HERE)
    assert data == b"data" and entry == right.entry


def test_if_none_is_compatible_the_error_lists_every_reason(tmp_path: Path, graph: Path) -> None:
    engines = [built(tmp_path, graph, compute_capabilities=["12.0"]), built(tmp_path, graph, version="1.6.0")]
    with pytest.raises(
        EngineUnavailableError, match=r"this GPU has 8\.9.*1\.7\.1 is installed.*build one with --rebuild"
    ) as caught:
        engine_for(graph, EngineOptions(), engines, HERE)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    with pytest.raises(EngineUnavailableError, match="none was built for this graph"):
        engine_for(graph, EngineOptions(), [], HERE)


def test_an_engine_of_a_changed_graph_is_incompatible(tmp_path: Path, graph: Path) -> None:
    engine = built(tmp_path, graph)
    other = tmp_path / "denoiser.onnx"
    other.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(EngineUnavailableError, match=r"built from another denoiser\.onnx"):
        engine_for(other, EngineOptions(), [engine], HERE)


def test_100_random_damages_raise_or_change_nothing(tmp_path: Path, graph: Path) -> None:
    """A damaged engine or entry raises InvalidInputError or has no effect; no other exception, no other engine."""
    right, draw = built(tmp_path, graph), random.Random(0)
    refused = 0
    for _ in range(100):
        entry, content = copy.deepcopy(right.entry), bytearray(b"data")
        if draw.random() < 0.5:
            content[draw.randrange(4)] ^= 1 << draw.randrange(8)
        else:
            key = draw.choice(sorted(entry))
            entry[key] = draw.choice([None, 1, "x", [], {}, [[1]], {"a": 1}])
        (tmp_path / "a.engine").write_bytes(bytes(content))
        try:
            data, _ = engine_for(graph, EngineOptions(), [PrebuiltEngine(tmp_path / "a.engine", entry)], HERE)
        except InvalidInputError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017  # not every damage raises
        else:
            assert data == b"data" and key in ("engine", "file", "graph", "options")
    assert refused > 70


def test_external_weights_are_part_of_the_graphs_hash(tmp_path: Path) -> None:
    tensor = b"\n\x08location\x12\x0bweights.bin"
    (tmp_path / "g.onnx").write_bytes(b"\x08\x09" + tensor)
    (tmp_path / "weights.bin").write_bytes(b"one")
    before = graph_sha256(tmp_path / "g.onnx")
    (tmp_path / "weights.bin").write_bytes(b"two")
    assert graph_sha256(tmp_path / "g.onnx") != before


@pytest.mark.skipif(tensorrt_engine.missing() is None, reason="TensorRT and cuda-python are installed")
def test_without_the_package_the_error_names_the_extra(graph: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"engine 'tensorrt' needs .* pip install 'diffpress\[tensorrt\]'"):
        load_engine(graph, "tensorrt")


@pytest.mark.skipif(tensorrt_engine.missing() is not None, reason="TensorRT or cuda-python is not installed")
def test_without_a_gpu_the_error_is_one_line(graph: Path) -> None:
    if tensorrt_engine.unusable() is None:
        pytest.skip("there is a GPU")
    with pytest.raises(
        EngineUnavailableError, match=r"engine 'tensorrt' cannot run here: no (usable )?NVIDIA GPU"
    ) as caught:
        load_engine(graph, "tensorrt")
    assert "\n" not in str(caught.value)


@needs_tensorrt
def test_a_rebuilt_engine_is_for_this_gpu_and_is_cached(tmp_path: Path, graph: Path, bundle: Bundle) -> None:
    import tensorrt_rtx

    device = Device("8.9", {"tensorrt-rtx": tensorrt_rtx.__version__})
    old = built(tmp_path, graph, compute_capabilities=["12.0"], options=BuildOptions(batch=(1, 2, 4)).to_json())
    cache = Cache(tmp_path / "cache", bundle.hash)
    data, entry = engine_for(graph, EngineOptions(rebuild=True, cache=cache), [old], device)
    assert entry["compute_capabilities"] == ["8.9"] and entry["options"]["batch"] == (1, 2, 4)
    assert incompatibility({**json.loads(json.dumps(entry)), "file": "x"}, device, graph_sha256(graph)) is None
    again, _ = engine_for(graph, EngineOptions(cache=cache), [old], device)
    assert again == data
    with pytest.raises(EngineUnavailableError):
        engine_for(graph, EngineOptions(cache=cache), [old], Device("8.6", device.libraries))


@needs_tensorrt
def test_a_rebuilt_engine_has_a_header_the_library_can_read(tmp_path: Path, graph: Path) -> None:
    import tensorrt_rtx

    device = Device("8.9", {"tensorrt-rtx": tensorrt_rtx.__version__})
    data, entry = engine_for(graph, EngineOptions(rebuild=True), [], device)
    assert type(data) is bytes and len(data) == entry["bytes"]
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    runtime = tensorrt_rtx.Runtime(tensorrt_rtx.Logger())
    header = data[: runtime.engine_header_size]
    assert runtime.get_engine_validity(header)[0] in tensorrt_rtx.EngineValidity.__members__.values()


@needs_tensorrt
def test_the_diagnostics_of_an_invalid_engine_are_decoded() -> None:
    import tensorrt_rtx

    runtime = tensorrt_rtx.Runtime(tensorrt_rtx.Logger())
    _, flags = runtime.get_engine_validity(b"x" * runtime.engine_header_size)
    assert reasons(tensorrt_rtx, flags) == "malformed engine"
    assert reasons(tensorrt_rtx, 3) == "version mismatch, unsupported cc"


def machine_with(
    monkeypatch: pytest.MonkeyPatch, capability: str, named: list[str], classic: bool = False
) -> SimpleNamespace:
    """Patch in this GPU and a TensorRT-RTX with these compute capabilities."""
    members = {f"SM{one.replace('.', '')}": one for one in named}
    trt = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__=members))
    both = ["tensorrt-rtx", "tensorrt"] if classic else ["tensorrt-rtx"]
    monkeypatch.setattr("diffpress.runtime.engines.tensorrt.library.installed", lambda: both)
    monkeypatch.setattr("diffpress.runtime.engines.tensorrt.library.library", lambda name: trt)
    monkeypatch.setattr("diffpress.runtime.engines.tensorrt.library.cuda_runtime", lambda: None)
    monkeypatch.setattr("diffpress.runtime.engines.tensorrt.library.gpu_capability", lambda cuda: capability)
    return trt


def test_classic_tensorrt_builds_for_gpus_that_tensorrt_rtx_does_not_list(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, "9.0", ["8.9"], classic=True)
    assert choose([]) == ("tensorrt", ["9.0"])


@pytest.mark.parametrize("requested", [["8.9", "9.0"], ["7.0"], ["9.0"], []])
def test_a_gpu_that_tensorrt_rtx_does_not_list_raises_before_building(
    requested: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, "9.0", ["8.9"])
    assert choose(["8.9"]) == ("tensorrt-rtx", ["8.9"])
    with pytest.raises(
        EngineUnavailableError, match=r"tensorrt-rtx cannot build for compute capability .* on a GPU of 9\.0"
    ):
        choose(requested)


def test_the_profile_follows_from_the_names_of_dimensions(bundle: Bundle) -> None:
    spec = bundle.spec
    channels, height, width = spec.sample_shape
    shapes = profile_shapes(
        {"sample": ["batch", channels, "height", "width"], "timestep": ["steps"]}, spec, BuildOptions((1, 2, 4))
    )
    assert shapes["sample"] == tuple((n, channels, height, width) for n in (1, 2, 4))
    assert shapes["timestep"] == ((1,), (2,), (4,))
    with pytest.raises(InvalidInputError, match="dimension 'depth' of input 'sample'"):
        profile_shapes({"sample": ["depth"]}, spec, BuildOptions())


def test_text_and_latents_have_their_own_ranges(bundle: Bundle) -> None:
    text = Conditioning(
        "text",
        encoders=(TextEncoder("text_encoder", "tokenizer", 16, 0),),
        inputs={"encoder_hidden_states": TextInput((16, 32), (("text_encoder.last_hidden_state",),))},
    )
    spec = replace(bundle.spec, sample_shape=(4, 8, 8), latent_factor=8, conditioning=text)
    options = BuildOptions((1, 2, 4), sizes=((32, 64), (128, 96)))
    inputs: dict[str, list[int | str]] = {
        "sample": ["batch", 4, "height", "width"],
        "encoder_hidden_states": ["batch", "sequence", 32],
    }
    shapes = profile_shapes(inputs, spec, options)
    assert shapes["sample"] == ((1, 4, 4, 8), (2, 4, 8, 8), (4, 4, 16, 12))
    assert shapes["encoder_hidden_states"][2] == (4, 16, 32)
    encoder = profile_shapes({"input_ids": ["batch", "sequence"]}, spec, options, "text_encoder")
    assert encoder["input_ids"][1] == (2, 16)
    latents: dict[str, list[int | str]] = {"latent_sample": ["batch", 4, "latent_height", "latent_width"]}
    decoder = profile_shapes(latents, spec, options, "vae_decoder")
    assert decoder["latent_sample"] == ((1, 4, 4, 8), (1, 4, 8, 8), (1, 4, 16, 12))
    images: dict[str, list[int | str]] = {"sample": ["batch", 3, "image_height", "image_width"]}
    image_encoder = profile_shapes(images, spec, options, "vae_encoder")
    assert image_encoder["sample"] == ((1, 3, 32, 64), (1, 3, 64, 64), (1, 3, 128, 96))
    residuals: dict[str, list[int | str]] = {"down_block_residual_3": ["batch", 32, "height // 2", "width // 4"]}
    controlled = profile_shapes(residuals, spec, options, "denoiser_control")
    assert controlled["down_block_residual_3"] == ((1, 32, 2, 2), (2, 32, 4, 2), (4, 32, 8, 3))
    with pytest.raises(InvalidInputError, match="sizes: 36 and 128 must be multiples of 8"):
        profile_shapes(inputs, spec, BuildOptions(sizes=((36, 64), (128, 96))))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": (2, 1, 4)},
        {"batch": (0, 1, 4)},
        {"optimization_level": 6},
        {"workspace_mib": 0},
        {"hardware_compatible": "ampere"},
        {"sizes": ((64, 64), (32, 64))},
    ],
)
def test_invalid_build_options_raise(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        BuildOptions(**wrong)


def test_build_options_round_trip_through_json() -> None:
    options = BuildOptions((1, 2, 3), ((8, 8), (16, 16)), 5, 64, True, True, True, True, True, "ampere_plus")
    assert BuildOptions.from_json(json.loads(json.dumps(options.to_json())), "x") == options
    for damaged in ({"batch": [1, 2]}, {"tf32": 1}, {"batch": "123"}, {"new": 1}, {"workspace_mib": True}, None):
        with pytest.raises(InvalidInputError, match=r"^x: "):
            BuildOptions.from_json(damaged, "x")
