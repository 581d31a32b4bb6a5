"""export/graph/model.py: graphs with lazily read weights, written inline or with external data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.export.graph.model import PAGE, Graph, Weight, load_all, save_graph, stub, weight_of, write_linked_graph
from diffpress.runtime.engines import available, load_engine
from tests.export.oracle import inputs_for, quantized_graph

DTYPES = [np.float32, np.float16, np.float64, np.int64, np.int8, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
DTYPES += [ml_dtypes.int4, ml_dtypes.float4_e2m1fn]


def lazy(name: str, array: np.ndarray, reads: list[str] | None = None) -> tuple[TensorProto, Weight]:
    def read() -> np.ndarray:
        if reads is not None:
            reads.append(name)
        return array

    weight = Weight(array.dtype, array.shape, read)
    return stub(name, weight), weight


def graph_of(arrays: dict[str, np.ndarray], reads: list[str] | None = None) -> Graph:
    """Return a graph with one Identity per array, whose output '<name>_out' is the array."""
    tensors = {name: lazy(name, array, reads) for name, array in arrays.items()}
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in arrays]
    outputs = [helper.make_tensor_value_info(f"{n}_out", t.data_type, t.dims) for n, (t, _) in tensors.items()]
    proto = helper.make_graph(nodes, "g", [], outputs, [tensor for tensor, _ in tensors.values()])
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return Graph(model, {name: weight for name, (_, weight) in tensors.items()})


@pytest.mark.parametrize("data", [None, "weights/g.onnx_data"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (40, 70)])
def test_an_array_of_any_type_and_shape_is_read_back_unchanged(
    shape: tuple[int, ...], dtype: type[np.generic], data: str | None, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    graph = graph_of({"w": values})
    save_graph(graph, tmp_path / "g.onnx", data=data)
    onnx.checker.check_model(tmp_path / "g.onnx", full_check=True)
    for model in (onnx.load(tmp_path / "g.onnx"), load_all(graph)):
        found = numpy_helper.to_array(model.graph.initializer[0])
        assert found.dtype == dtype and found.shape == shape
        np.testing.assert_array_equal(found, values)


def test_a_transposed_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    values = np.arange(2000, dtype=np.float32).reshape(20, 100).T
    for data in (None, "d"):
        save_graph(graph_of({"w": values}), tmp_path / "g.onnx", data=data)
        np.testing.assert_array_equal(
            numpy_helper.to_array(onnx.load(tmp_path / "g.onnx").graph.initializer[0]), values
        )


def test_the_inline_file_is_the_message_protobuf_would_write(unet_graph: Graph, tmp_path: Path) -> None:
    save_graph(unet_graph, tmp_path / "g.onnx")
    complete = load_all(unet_graph)
    order = [t.name for t in onnx.load(tmp_path / "g.onnx").graph.initializer]
    by_name = {t.name: t for t in load_all(unet_graph).graph.initializer}
    del complete.graph.initializer[:]
    complete.graph.initializer.extend(by_name[name] for name in order)
    assert onnx.load(tmp_path / "g.onnx") == complete
    assert (tmp_path / "g.onnx").stat().st_size == complete.ByteSize()
    onnx.checker.check_model(tmp_path / "g.onnx", full_check=True)


def test_writing_reads_the_weights_one_by_one_and_each_once(tmp_path: Path) -> None:
    arrays = {name: np.full(1000, i, np.float32) for i, name in enumerate("abc")}
    for data in (None, "d"):
        reads: list[str] = []
        save_graph(graph_of(arrays, reads), tmp_path / "g.onnx", data=data)
        assert reads == ["a", "b", "c"]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("engine", available())
def test_weights_in_a_subfolder_and_a_second_layout_compute_the_same(
    engine: str,
    quantized: bool,
    unet: Checkpoint,
    unet_graph: Graph,
    scales: Callable[..., Quantization],
    tmp_path: Path,
) -> None:
    graph = quantized_graph(unet_graph, scales(unet, weight_range=127 / 64)) if quantized else unet_graph
    save_graph(graph, tmp_path / "inline.onnx")
    (tmp_path / "bundle").mkdir()
    root, view = tmp_path / "bundle" / "denoiser.onnx", tmp_path / "bundle" / "unet" / "model.onnx"
    save_graph(graph, root, data="unet/model.onnx_data")
    write_linked_graph(root, view)
    files = sorted(p.relative_to(root.parent).as_posix() for p in root.parent.rglob("*") if p.is_file())
    assert files == ["denoiser.onnx", "unet/model.onnx", "unet/model.onnx_data"]
    expected = load_engine(tmp_path / "inline.onnx", engine, threads=1).run(inputs_for(unet))
    for path in (root, view):
        onnx.checker.check_model(path, full_check=True)
        np.testing.assert_array_equal(load_engine(path, engine, threads=1).run(inputs_for(unet)), expected)


def test_data_is_page_aligned_and_only_small_tensors_stay_in_the_graph(unet_graph: Graph, tmp_path: Path) -> None:
    save_graph(unet_graph, tmp_path / "g.onnx", data="g.onnx_data")
    tensors = onnx.load(tmp_path / "g.onnx", load_external_data=False).graph.initializer
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in tensors if t.external_data}
    assert len(entries) > 20 and all(int(entry["offset"]) % PAGE == 0 for entry in entries.values())
    assert {t.name for t in tensors if weight_of(unet_graph, t.name).nbytes > 1024} == set(entries)
    assert (tmp_path / "g.onnx").stat().st_size < 200_000


def test_the_same_graph_gives_the_same_files(unet_graph: Graph, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_graph(unet_graph, tmp_path / folder / "g.onnx", data="d/w")
    for file in ("g.onnx", "d/w"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_weights_that_exceed_the_protobuf_limit_go_to_a_data_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph = graph_of({"w": np.zeros(5000, np.float32)})
    save_graph(graph, tmp_path / "g.onnx")
    size = (tmp_path / "g.onnx").stat().st_size
    monkeypatch.setattr("diffpress.export.graph.model.MAX_INLINE_BYTES", size - 1000)
    save_graph(graph, tmp_path / "g.onnx")
    assert (tmp_path / "g.onnx").stat().st_size < 500
    assert (tmp_path / "g.onnx.data").stat().st_size == 20_000


def test_a_view_must_not_lie_outside_the_folders_above_its_data(unet_graph: Graph, tmp_path: Path) -> None:
    save_graph(unet_graph, tmp_path / "denoiser.onnx", data="unet/model.onnx_data")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="is not in the subpath"):
        write_linked_graph(tmp_path / "denoiser.onnx", tmp_path / "elsewhere" / "model.onnx")


def test_an_invalid_graph_is_rejected_before_anything_is_written(tmp_path: Path) -> None:
    graph = graph_of({"w": np.zeros(3, np.float32)})
    graph.proto.graph.node[0].input[0] = "missing"
    with pytest.raises(onnx.checker.ValidationError, match="missing"):
        save_graph(graph, tmp_path / "g.onnx")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_changed_its_shape_is_named() -> None:
    graph = graph_of({"w": np.zeros(3, np.float32)})
    changed = Graph(graph.proto, {"w": graph.weights["w"]._replace(read=lambda: np.zeros(4, np.float32))})
    with pytest.raises(ValueError, match=r"weight 'w' is float32 \(4,\), but was.*export again"):
        load_all(changed)


def test_any_initializer_is_found_by_name(everything_graph: Graph) -> None:
    assert weight_of(everything_graph, "first.weight").shape == (8, 2, 3, 3)
    bias = weight_of(everything_graph, "first.bias")
    assert "first.bias" not in everything_graph.weights and bias.read().shape == bias.shape == (8,)
    with pytest.raises(KeyError):
        weight_of(everything_graph, "nowhere")


def test_weights_that_another_graph_stores_are_not_stored_again(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    same, ours, theirs = (noise.standard_normal((40, 50), np.float32) for _ in range(3))
    save_graph(graph_of({"same": same, "other": theirs}), tmp_path / "a.onnx", data="unet/a.data")
    written = save_graph(
        graph_of({"same": same, "other": ours, "new": ours}), tmp_path / "b.onnx", beside=tmp_path / "a.onnx"
    )
    files = [tmp_path / name for name in ("b.onnx", "b.onnx.data")]
    assert written == sum(file.stat().st_size for file in files)
    assert files[1].stat().st_size == PAGE * (-(-ours.nbytes // PAGE)) + ours.nbytes
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(files[0]).graph.initializer}
    for name, array in {"same": same, "other": ours, "new": ours}.items():
        np.testing.assert_array_equal(found[name], array)
    save_graph(graph_of({"same": same}), tmp_path / "c.onnx", beside=tmp_path / "a.onnx")
    assert not (tmp_path / "c.onnx.data").exists()
