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
    fix = nncf.OverflowFix.ENABLE if args.no_dot_products else nncf.OverflowFix.FIRST_LAYER
    with contextlib.redirect_stdout(sys.stderr):
        model = nncf.quantize(
            openvino.Core().read_model(args.graph),
            nncf.Dataset([dict(np.load(file)) for file in args.inputs]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(args.inputs),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, args.out, compress_to_fp16=False)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak_mib(), "version": nncf.__version__}))


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
