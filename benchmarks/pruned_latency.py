"""What pruning gains in an engine: the time of a step of pruned networks, as a fraction of the whole network's.

    python benchmarks/pruned_latency.py [CHECKPOINT ...] [--engines openvino onnxruntime] [--json FILE]

Each built-in teacher is pruned in width (magnitude, global) and in depth (ablation) to 0.56 of its MACs, and in width
to 0.6 of its latency in each engine. The fp32 graphs are timed in alternation with the unpruned one, batch 8, medians;
the time of a result is measured again after the search that chose it. Needs diffpress[compress].
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

TEACHERS = ("calib_data/teacher", "calib_data/icons/teacher")
MACS, LATENCY = 0.56, 0.6


def rows(name: str, engines: list[str], work: Path) -> list[dict[str, Any]]:
    """Return one row for each pruned network and engine."""
    import diffpress as dp
    from diffpress.compress.context import Context
    from diffpress.compress.models.counts import count
    from diffpress.compress.pruning.prune import prune
    from diffpress.export.targets.engine_cost import open_engine_costs

    teacher = dp.load(name)
    width: dict[str, Any] = {"method": "magnitude", "scope": "global"}
    stages: dict[str, tuple[Any, list[str]]] = {
        f"width, macs {MACS}": (dp.Prune(target={"macs": MACS}, **width), engines),
        f"depth, macs {MACS}": (dp.PruneDepth(target={"macs": MACS}), engines),
    }
    for engine in engines:
        target = {"latency": LATENCY, "engine": engine}
        stages[f"width, latency {LATENCY} in {engine}"] = (dp.Prune(target=target, **width), [engine])
    found = []
    for what, (config, timed) in stages.items():
        small = prune(teacher, config, Context(0, work, teacher, open_engine_costs=open_engine_costs))
        before, after = (count(one.model, one.spec) for one in (teacher, small))
        for engine in timed:
            with open_engine_costs(teacher, engine) as costs:
                latency = costs.relative_latency(small)
            row = {"teacher": name, "pruned": what, "engine": engine, "latency": round(latency, 3)}
            row |= {"macs": round(after.macs / before.macs, 3)}
            row |= {"params": round(after.parameters / before.parameters, 3)}
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def main() -> None:
    """Measure and print one line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=TEACHERS)
    parser.add_argument("--engines", nargs="+", default=["openvino", "onnxruntime"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    found = []
    for name in args.checkpoints:
        with tempfile.TemporaryDirectory() as work:
            found += rows(name, args.engines, Path(work))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
