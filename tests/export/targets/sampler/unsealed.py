"""Bundles as the export has them before they are sealed, made without an export: nothing is traced or verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.manifest import graph_entry
from diffpress.export.targets.sampler.build import build_sampler
from diffpress.export.targets.sampler.placement import save_sampler
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.spec import DenoiserSpec

SHAPE = (3, 3, 4)


def unsealed_bundle(folder: Path, graph: Graph, spec: DenoiserSpec, precision: str = "fp32") -> Bundle:
    """Write the graph as the denoiser of a bundle in `folder`."""
    folder.mkdir(exist_ok=True)
    save_graph(graph, folder / "denoiser.onnx")
    entry = graph_entry("denoiser.onnx", graph, precision)
    return Bundle(folder, spec, {"graphs": {"denoiser": entry}, "engines": [], "files": {}})


def written_sampler(bundle: Bundle, file: str = "sampler.onnx") -> Path:
    """Write the bundle's sampler and return its path."""
    save_sampler(build_sampler(bundle), bundle.path / file)
    return bundle.path / file


def nonlinear_graph(dtype: type = np.float32, condition: str = "class_labels") -> Graph:
    """Return a nonlinear network of sample [N, 3, 3, 4], timestep and label: tanh(conv(x) + t / 1000 + label / 5).

    `dtype` is that of its sample and its output, `condition` the name of the label.
    """
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    filters = np.random.default_rng(0).standard_normal((3, 3, 3, 3)) * 0.3
    constants = {
        "filters": filters.astype(np.float32),
        "per_step": np.float32(1e-3),
        "per_class": np.float32(0.2),
        "each": np.array([-1, 1, 1, 1]),
    }
    nodes = [
        helper.make_node("Cast", ["sample"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["wide", "filters"], ["convolved"], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", [condition], ["label"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["label", "per_class"], ["by_class"]),
        helper.make_node("Mul", ["timestep", "per_step"], ["by_step"]),
        helper.make_node("Add", ["by_class", "by_step"], ["shift"]),
        helper.make_node("Reshape", ["shift", "each"], ["column"]),
        helper.make_node("Add", ["convolved", "column"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["wide_out"]),
        helper.make_node("Cast", ["wide_out"], ["out_sample"], to=kind),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("sample", kind, ["batch", *SHAPE]),
        value("timestep", TensorProto.FLOAT, ["batch"]),
        value(condition, TensorProto.INT64, ["batch"]),
    ]
    graph = helper.make_graph(
        nodes,
        "nonlinear",
        inputs,
        [value("out_sample", kind, ["batch", *SHAPE])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def stored_arrays(path: Path) -> dict[str, list[np.ndarray]]:
    """Return name of each graph of a file, the main graph and its subgraphs -> its initializers."""

    def in_graph(graph: onnx.GraphProto) -> dict[str, list[np.ndarray]]:
        found = {graph.name: [numpy_helper.to_array(tensor) for tensor in graph.initializer]}
        for node in graph.node:
            for attribute in node.attribute:
                found |= in_graph(attribute.g) if attribute.HasField("g") else {}
        return found

    return in_graph(onnx.load(path).graph)


def stored_bytes(path: Path) -> int:
    """Return the bytes of all initializers of a file."""
    return sum(array.nbytes for arrays in stored_arrays(path).values() for array in arrays)
