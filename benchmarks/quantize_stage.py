"""Seconds of the quantize stage alone, on the built-in teacher (20 steps, 3.5M parameters).

    python benchmarks/quantize_stage.py [plain] [methods] [--json FILE]

    plain      int8, everything else by default: 32 trajectories, output correction
    methods    w4a8 with AWQ, bounds {min_sqnr_db: 20} and QAT, each by default: 64 trajectories, 200 training steps

Prints the seconds and a hash of the scales.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "methods": {"format": "w4a8", "awq": True, "bounds": {"min_sqnr_db": 20.0}, "qat": True},
}


def measured(name: str, work: Path) -> dict[str, Any]:
    """Run the stage once in an empty folder."""
    from diffpress.compress.builtin import CALIB_DATA, TEACHER
    from diffpress.compress.context import Context
    from diffpress.compress.quantization.config import QuantizeConfig
    from diffpress.compress.quantization.quantize import quantize
    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.compress.training.sample_data import load_samples
    from diffpress.export.targets.engine_cost import open_engine_costs

    teacher = load_checkpoint(TEACHER)
    images = load_samples(CALIB_DATA / "calibration.npz", teacher.spec)
    ctx = Context(0, work, teacher, images, open_engine_costs)
    began = time.monotonic()
    result = quantize(teacher, QuantizeConfig(**CONFIGS[name]), ctx)
    seconds = time.monotonic() - began
    assert result.quantization is not None
    digest = hashlib.sha256()
    for key, value in sorted(result.quantization.tensors.items()):
        digest.update(key.encode() + value.numpy().tobytes())
    return {"stage": name, "seconds": round(seconds, 1), "scales": digest.hexdigest()[:16]}


def main() -> None:
    """Measure and print one line for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CONFIGS), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="  %(message)s")
    rows = []
    for name in args.names:
        with tempfile.TemporaryDirectory() as work:
            rows.append(measured(name, Path(work)))
        print(rows[-1])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
