"""Fault campaigns: `python -m tests.campaign [NAME ...] --minutes N --seed S [--json FILE]`.

They try to break what the documentation promises; docs/reliability.md has the results. They are no part of pytest,
because they take minutes to hours. A module NAME.py has `run(minutes, seed) -> Result`, and is imported only when used.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from pathlib import Path

from tests.campaign.result import Result

# campaign -> what it does to the product; tests/campaign/<name>.py has `run`
CAMPAIGNS = {
    "kill": "SIGKILL at random moments and at every write of a run, then resume it",
    "disk": "full disk, read-only folders, memory and file size limits, at every write",
    "fuzz": "mutated recipes, manifests, graphs and other input files",
    "hostile": "bundles and checkpoints that were made to do harm",
    "soak": "very many samples and loads in one process; threads that share one pipeline",
    "parallel": "several commands at the same time on one folder or one cache",
    "platform": "locales, time zones, clocks, paths, users, hash seeds and instruction sets",
}


def main(argv: list[str] | None = None) -> int:
    """Run campaigns, print their counts, and return 1 if anything failed."""
    parser = argparse.ArgumentParser("python -m tests.campaign", description="Try to break diffpress.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"campaigns, all by default: {', '.join(CAMPAIGNS)}")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for each campaign (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and failures to FILE")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in CAMPAIGNS]:
        parser.error(f"unknown campaign {unknown[0]}; choose from {', '.join(CAMPAIGNS)}")

    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    for name in args.names or CAMPAIGNS:
        began = time.monotonic()
        results[name] = importlib.import_module(f"tests.campaign.{name}").run(args.minutes, args.seed)
        seconds[name] = round(time.monotonic() - began, 1)
    _print(results, seconds)
    if args.json:
        campaigns = {name: {**result.to_json(), "seconds": seconds[name]} for name, result in results.items()}
        facts = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "processor": _processor(), "seed": args.seed}
        args.json.write_text(json.dumps(facts | {"campaigns": campaigns}, indent=1) + "\n", encoding="utf-8")
    return int(any(result.failures for result in results.values()))


def _print(results: dict[str, Result], seconds: dict[str, float]) -> None:
    lines = [f"{'campaign':<10} {'tried':>8} {'survived':>9} {'seconds':>8}"]
    lines += [f"{name:<10} {r.tried:>8} {r.survived:>9} {seconds[name]:>8}" for name, r in results.items()]
    lines += [f"{name}: {note}" for name, result in results.items() for note in result.notes]
    lines += [f"{name}: FAILED {failure}" for name, result in results.items() for failure in result.failures]
    sys.stdout.write("\n".join(lines) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
