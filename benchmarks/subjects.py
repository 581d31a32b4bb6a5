"""The subjects of a race, and what is measured of each, in processes of its own.

    accuracy   SQNR of the output at each evaluation of set B, and of the subject's own final x_0; integer MAC share
    timing     seconds from opening the model to its first output, milliseconds of each repeat, peak memory

Adding a subject takes one entry of SUBJECTS and, if its model is not made yet, one of MAKINGS. A subject opens as a
network of diffpress's runtime (inputs by name -> output), so that shapes, plan and sampler are the same for all.
OpenVINO alone and NNCF run without diffpress's engine, which changes graphs (runtime/engines/openvino).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fitted_network import load_network, weights_file
from made_models import COMPARED_SEED, Race, recorded, sampled, spec_of
from quantization import size

if TYPE_CHECKING:
    from diffpress.runtime.engines.precision_report import PrecisionReport
    from diffpress.runtime.spec import DenoiserSpec

Opened = tuple[Any, "DenoiserSpec"]  # a Network and its spec


@dataclass(frozen=True)
class Subject:
    """A way to evaluate the network.

    Attributes:
        label: Its name in the table.
        open: Opens it; a folder for compiled models that a second process may use is given.
        file: Returns the file of its graph.
        made_by: Steps of making whose time and memory are its own.
        needs: Other steps of making that it needs.
        ours: Whether diffpress quantized it.
        peer: Whether another tool quantized it.
    """

    label: str
    open: Callable[[Race, Path], Opened]
    file: Callable[[Race], Path]
    made_by: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("record", "float")
    ours: bool = False
    peer: bool = False

    @property
    def makings(self) -> tuple[str, ...]:
        """All steps of making that it needs."""
        return (*self.made_by, *self.needs)


# --- opening -----------------------------------------------------------------------------------------------------


class TorchInDtype:
    """A torch model in one dtype as a network; inputs of floating point are converted to it."""

    def __init__(self, race: Race, dtype: str, compiled: bool) -> None:
        import torch

        from diffpress.compress.models.adapter import adapter_for
        from diffpress.compress.models.torch_network import TorchNetwork

        checkpoint = load_network(race.model, race.network, dtype)
        self._forward, self._dtype = adapter_for(checkpoint.model).forward, getattr(torch, dtype)
        self.inputs: Mapping[str, np.dtype] = TorchNetwork(checkpoint.model, checkpoint.spec).inputs
        self._model: Any = torch.compile(checkpoint.model, dynamic=False) if compiled else checkpoint.model

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the output for one batch in float32."""
        import torch

        feed = {name: torch.from_numpy(array) for name, array in inputs.items()}
        feed = {name: x.to(self._dtype) if x.is_floating_point() else x for name, x in feed.items()}
        with torch.no_grad():
            out: np.ndarray = self._forward(self._model, feed).float().numpy()
        return out


def _torch(dtype: str, compiled: bool = False) -> Callable[[Race, Path], Opened]:
    def opened(race: Race, cache: Path) -> Opened:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        return TorchInDtype(race, dtype, compiled), spec_of(race)

    return opened


class PlainOpenVino:
    """A graph as a user of OpenVINO runs it: unchanged, for fixed shapes, with OpenVINO's own cache."""

    def __init__(self, path: Path, precision: str, cache: Path) -> None:
        import openvino

        from diffpress.runtime.engines.openvino.engine import HINTS

        self._core = openvino.Core()
        self._core.set_property({"CACHE_DIR": str(cache)})
        self._options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[precision]}
        self._model = self._core.read_model(path)
        self.inputs = {node.get_any_name(): np.dtype(node.element_type.to_dtype()) for node in self._model.inputs}
        self._compiled: Any = None
        self._request: Any = None

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the output for one batch, of the same shape in every call."""
        if self._request is None:
            self._model.reshape({name: array.shape for name, array in inputs.items()})
            self._compiled = self._core.compile_model(self._model, "CPU", self._options)
            self._request = self._compiled.create_infer_request()
        out: np.ndarray = self._request.infer(inputs, share_inputs=True).to_tuple()[0]
        return out

    def precision_report(self, example_inputs: dict[str, np.ndarray]) -> PrecisionReport:
        """Report precision from the layers of the compiled model."""
        from diffpress.runtime.engines.openvino.layers import products
        from diffpress.runtime.engines.precision_report import precision_report_of

        self.run(example_inputs)
        return precision_report_of(list(products(self._model, self._compiled)), ())


def _plain_openvino(file: Callable[[Race], Path], precision: str) -> Callable[[Race, Path], Opened]:
    return lambda race, cache: (PlainOpenVino(file(race), precision, cache), spec_of(race))


def _engine(name: str, file: Callable[[Race], Path], precision: str = "fp32") -> Callable[[Race, Path], Opened]:
    """Return what opens a single graph in an engine of diffpress."""

    def opened(race: Race, cache: Path) -> Opened:
        from diffpress.runtime.engines import load_engine
        from diffpress.runtime.engines.cache import Cache
        from diffpress.runtime.engines.options import EngineOptions

        path = file(race)
        status = path.stat()
        stored = Cache(cache, f"{path} {status.st_size} {status.st_mtime_ns}")
        return load_engine(path, name, options=EngineOptions(precision=precision, cache=stored)), spec_of(race)

    return opened


def _bundle(name: str, precision: str = "fp32") -> Callable[[Race, Path], Opened]:
    """Return what opens our bundle in an engine, as a user does."""

    def opened(race: Race, cache: Path) -> Opened:
        from diffpress.runtime.bundle import load_bundle
        from diffpress.runtime.engines import open_engine
        from diffpress.runtime.engines.cache import Cache
        from diffpress.runtime.engines.options import EngineOptions

        bundle = load_bundle(race.bundle)
        engine = open_engine(bundle, name, options=EngineOptions(precision=precision, cache=Cache(cache)))
        return engine, bundle.spec_for(name)

    return opened


def _weights(race: Race) -> Path:
    return weights_file(race.model, race.network)


def _float_graph(race: Race) -> Path:
    return race.float_graph


def _nncf_graph(race: Race) -> Path:
    return race.nncf_graph


def _int8_graph(engine: str) -> Callable[[Race], Path]:
    def file(race: Race) -> Path:
        from diffpress.runtime.bundle import load_bundle

        return load_bundle(race.bundle).graph("denoiser", engine)

    return file


# --- the table ---------------------------------------------------------------------------------------------------

REFERENCE = "openvino-fp32"  # whose time the others are divided by


def _of_float(label: str, engine: str, precision: str = "fp32") -> Subject:
    return Subject(label, _engine(engine, _float_graph, precision), _float_graph, ("float",))


def _of_bundle(label: str, engine: str, precision: str = "fp32") -> Subject:
    return Subject(label, _bundle(engine, precision), _int8_graph(engine), ("ptq", "export"), ours=True)


def _of_openvino(label: str, precision: str) -> Subject:
    return Subject(label, _plain_openvino(_float_graph, precision), _float_graph, ("float",))


def _of_nncf(label: str, precision: str) -> Subject:
    return Subject(label, _plain_openvino(_nncf_graph, precision), _nncf_graph, ("nncf",), peer=True)


SUBJECTS: dict[str, Subject] = {
    "torch-fp32": Subject("PyTorch eager fp32", _torch("float32"), _weights, needs=("record",)),
    "torch-bf16": Subject("PyTorch eager bf16", _torch("bfloat16"), _weights, needs=("record",)),
    "torch-compile": Subject("torch.compile fp32", _torch("float32", compiled=True), _weights, needs=("record",)),
    "onnxruntime-fp32": _of_float("ONNX Runtime fp32", "onnxruntime"),
    "onnxruntime-int8": _of_bundle("ONNX Runtime int8 (diffpress)", "onnxruntime"),
    "openvino-fp32": _of_openvino("OpenVINO fp32", "fp32"),
    "openvino-bf16": _of_openvino("OpenVINO bf16", "bf16"),
    "openvino-bf16-diffpress": _of_float("OpenVINO bf16 (diffpress)", "openvino", "bf16"),
    "openvino-int8": _of_bundle("OpenVINO int8 (diffpress), fp32 around", "openvino"),
    "openvino-int8-bf16": _of_bundle("OpenVINO int8 (diffpress), bf16 around", "openvino", "bf16"),
    "nncf": _of_nncf("NNCF int8 in OpenVINO, fp32 around", "fp32"),
    "nncf-bf16": _of_nncf("NNCF int8 in OpenVINO, bf16 around", "bf16"),
}


# --- measuring ---------------------------------------------------------------------------------------------------


def accuracy(race: Race, name: str) -> dict[str, Any]:
    """Compare a subject with torch fp32 on set B, and report what it ran on integers."""
    from diffpress.compress.evaluation.metrics import mean_sqnr_db, sqnr_db

    network, spec = SUBJECTS[name].open(race, _cache(race, name))
    evaluations = recorded(race, "B")
    outputs_db = [sqnr_db(expected, network.run(inputs)) for inputs, expected in evaluations]
    _, final = sampled(network, spec, COMPARED_SEED)
    row = {
        "sqnr_db": statistics.mean(outputs_db),
        "sqnr_min_db": min(outputs_db),
        "x0_db": mean_sqnr_db(np.load(race.inputs / "B-final.npy"), final),
        "file_bytes": size(SUBJECTS[name].file(race)),
    }
    if hasattr(network, "precision_report"):
        report = network.precision_report(evaluations[0][0])
        outside = integer_share_outside_attention(report.float_layers, json.loads(race.layer_names.read_text()))
        row |= {"integer_mac_share": report.integer_mac_share, "integer_share_outside_attention": outside}
    return row


def integer_share_outside_attention(float_layers: Mapping[str, float], layers: Collection[str]) -> float:
    """Return 1 - float MACs of layers / (all MACs - float MACs of the others, which are products of attention).

    Args:
        float_layers: Float MACs of each product by name, as a share of all MACs.
        layers: Names of the network's layers.
    """
    names = set(layers)
    in_layers = sum(share for name, share in float_layers.items() if name in names)
    return max(0.0, 1.0 - in_layers / max(1.0 - (sum(float_layers.values()) - in_layers), 1e-9))


def timing(race: Race, name: str, repeats: int, first: bool) -> dict[str, Any]:
    """Time a subject on the first evaluation of set B, after one that counts as loading.

    `first` removes what an earlier process compiled.
    """
    from diffpress.runtime.benchmarking.probe import peak_mib

    cache = _cache(race, name)
    if first:
        shutil.rmtree(cache, ignore_errors=True)
    inputs, _ = recorded(race, "B")[0]
    start = time.perf_counter()
    network, _ = SUBJECTS[name].open(race, cache)
    network.run(inputs)
    load_seconds = time.perf_counter() - start
    times_ms = []
    for _ in range(repeats):
        start = time.perf_counter()
        network.run(inputs)
        times_ms.append((time.perf_counter() - start) * 1e3)
    return {"load_seconds": load_seconds, "times_ms": times_ms, "run_peak_mib": peak_mib()}


def _cache(race: Race, name: str) -> Path:
    return race.folder / "cache" / name
