"""Time and memory of pruning a network of real size with random weights.

    python benchmarks/prune_stage.py {sd15,sdxl,dit_xl} [SETTINGS ...] --work DIR

SETTINGS are JSON, one prune stage each; by default two widths and, for sd15, a preset. The network is written to DIR
and loaded from there, once for each stage, in a process of its own. Prints one JSON line for each: what remains, the
seconds of the stage, and the largest memory of the process as a multiple of the fp32 weights. Needs
diffpress[compress].
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from real_size_models import MODELS

MAGNITUDE = {"method": "magnitude"}
DEFAULTS = [{**MAGNITUDE, "ratio": 0.3}, {**MAGNITUDE, "target": {"macs": 0.56}}]
PRESETS = {"sd15": [{"kind": "depth", "preset": "bk_sdm_small"}]}


def write_network(name: str, folder: Path) -> None:
    """Write the network with random weights in diffusers' layout, unless it is there."""
    import diffusers
    import torch

    model = MODELS[name]
    if (folder / model.component / "config.json").is_file():
        return
    torch.manual_seed(0)
    getattr(diffusers, model.kind)(**model.config).save_pretrained(folder / model.component)


def measured(folder: Path, settings: dict[str, object]) -> dict[str, object]:
    """Prune the network in `folder` and return what it cost."""
    from pydantic import TypeAdapter

    from diffpress.compress.context import Context
    from diffpress.compress.models.counts import count
    from diffpress.compress.pruning.prune import AnyPruneConfig, prune
    from diffpress.compress.sources.load import load_checkpoint

    config = TypeAdapter(AnyPruneConfig).validate_python(settings)
    checkpoint = load_checkpoint(folder)
    loaded = _peak_bytes()
    began = time.monotonic()
    small = prune(checkpoint, config, Context(0, folder / "work", checkpoint))
    seconds, peak = time.monotonic() - began, _peak_bytes()
    before, after = (count(one.model, one.spec) for one in (checkpoint, small))
    return {
        "settings": settings,
        "parameters": after.parameters,
        "params_fraction": round(after.parameters / before.parameters, 3),
        "macs_fraction": round(after.macs / before.macs, 3),
        "seconds": round(seconds, 1),
        "peak": round(peak / before.fp32_bytes, 2),
        "peak_loaded": round(loaded / before.fp32_bytes, 2),
    }


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure and print one line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("settings", nargs="*", type=json.loads)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.work / args.model
    if args.here:
        print(json.dumps(measured(folder, args.settings[0])))
        return
    write_network(args.model, folder)
    for settings in args.settings or [*DEFAULTS, *PRESETS.get(args.model, [])]:
        command = [sys.executable, __file__, args.model, json.dumps(settings), "--work", str(args.work), "--here"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
