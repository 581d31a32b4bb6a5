"""Target triton: the sampler as a model repository of NVIDIA's Triton Inference Server.

    triton/sampler/config.pbtxt       names, types and shapes of the sampler's inputs and outputs
    triton/sampler/1/model.onnx       the same file as sampler.onnx

One model is enough, because the loop over the steps is inside; Triton's ensembles have no loops. Prompts are tokenized
by the client. Triton does not batch requests (max_batch_size 0): the guidance weight has no batch dimension, and a
request may have any number of images.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpress.runtime.io.files import link_or_copy

REPOSITORY, MODEL = "triton", "sampler"
TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
ANY_SIZE = -1


def write_repository(folder: Path, sampler: str, description: Mapping[str, Any]) -> str:
    """Write the model repository into a bundle's folder; returns its name there.

    Args:
        folder: The bundle's folder, which has the sampler.
        sampler: The sampler's file in it; weights in a data file beside it come along.
        description: Content of sampler.json.
    """
    model = folder / REPOSITORY / MODEL
    version = model / "1"
    version.mkdir(parents=True)
    (model / "config.pbtxt").write_text(model_config(description), encoding="utf-8")
    link_or_copy(str(folder / sampler), str(version / "model.onnx"))
    data = folder / f"{sampler}.data"
    if data.is_file():
        shutil.copyfile(data, version / data.name)  # the graph refers to this name; onnx refuses data with two links
    return REPOSITORY


def model_config(description: Mapping[str, Any]) -> str:
    """Return the text of config.pbtxt for the tensors of sampler.json."""
    tensors = [
        _tensor(kind, name, entry)
        for kind, entries in (("input", description["inputs"]), ("output", description["outputs"]))
        for name, entry in entries.items()
    ]
    return "\n".join([f'name: "{MODEL}"', 'backend: "onnxruntime"', "max_batch_size: 0", *tensors]) + "\n"


def _tensor(kind: str, name: str, entry: Mapping[str, Any]) -> str:
    sizes = ", ".join(str(size if isinstance(size, int) else ANY_SIZE) for size in entry["shape"])
    # Triton requires at least one size: clients send [1], which it reshapes to no dimension
    dims = f"dims: [ {sizes} ]" if sizes else "dims: [ 1 ] reshape { shape: [ ] }"
    return f'{kind} {{ name: "{name}" data_type: {TYPES[entry["dtype"]]} {dims} }}'
