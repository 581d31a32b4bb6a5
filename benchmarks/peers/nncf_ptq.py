"""NNCF's post-training quantization of an ONNX file, as its documentation recommends it for transformers and U-Nets.

    python nncf_ptq.py GRAPH.onnx OUT.xml --inputs A-0.npz A-1.npz ...      writes an IR, prints JSON

Runs in an environment of its own, which needs numpy, openvino and nncf only. The transformer preset includes
SmoothQuant; fast bias correction is the default. An entry of the dataset is one evaluation: splitting the batches into
single samples cost 3 dB on a small U-Net, since NNCF averages its ranges over the entries.
"""

from __future__ import annotations

import time

start = time.perf_counter()  # with the imports, as for the other subjects

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import nncf  # noqa: E402
import numpy as np  # noqa: E402
import openvino  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--inputs", type=Path, nargs="+", required=True)
    parser.add_argument("--no-dot-products", action="store_true", help="8-bit products overflow on this processor")
    args = parser.parse_args()
    inputs = [dict(np.load(file)) for file in args.inputs]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):
        quantize_onnx(args.graph, inputs, transformer=True, dot_products=not args.no_dot_products, out=args.out)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak_mib(), "version": nncf.__version__}))


def quantize_onnx(
    graph: Path, batches: Sequence[dict[str, np.ndarray]], transformer: bool, dot_products: bool, out: Path
) -> None:
    """Quantize an ONNX file and save it as an OpenVINO IR.

    Args:
        graph: The float graph.
        batches: Inputs of one evaluation each, by name.
        transformer: Whether to use the preset for transformers.
        dot_products: Whether the processor sums 8-bit products without overflow.
        out: The IR.
    """
    fix = nncf.OverflowFix.FIRST_LAYER if dot_products else nncf.OverflowFix.ENABLE
    model = nncf.quantize(
        openvino.Core().read_model(graph),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        subset_size=len(batches),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )
    openvino.save_model(model, out, compress_to_fp16=False)


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
