"""A graph read from a file; weights in its data file are read when they are written elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from diffpress.export.graph.model import Graph, Weight, stub


def read_graph(path: Path) -> Graph:
    """Read an ONNX file; each tensor of its data file becomes a `Weight`."""
    proto = onnx.load(path, load_external_data=False)
    weights = {}
    for tensor in proto.graph.initializer:
        if not uses_external_data(tensor):
            continue
        stored = TensorProto()
        stored.CopyFrom(tensor)
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        weights[tensor.name] = Weight(dtype, tuple(tensor.dims), partial(_stored_array, stored, path.parent))
        tensor.CopyFrom(stub(tensor.name, weights[tensor.name]))
    return Graph(proto, weights)


def _stored_array(stored: TensorProto, folder: Path) -> np.ndarray:
    """Read a tensor's bytes here: onnx's own function refuses files with several links, which a bundle may have."""
    where = ExternalDataInfo(stored)
    with (folder / where.location).open("rb") as file:
        file.seek(where.offset or 0)
        raw = file.read(where.length or -1)
    tensor = TensorProto(data_type=stored.data_type, dims=stored.dims, raw_data=raw)
    return numpy_helper.to_array(tensor)
