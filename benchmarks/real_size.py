"""Race at full model size: time, agreement, memory and effort of diffpress, the engines alone and NNCF, no download.

    python benchmarks/real_size.py sd15              U-Net of Stable Diffusion 1.5 (860M), 8 steps with guidance
    python benchmarks/real_size.py sdxl              U-Net of SDXL (2.6B), 4 steps, weights in bfloat16
    python benchmarks/real_size.py dit_xl            DiT-XL/2 (675M), 8 steps, weights in bfloat16
    python benchmarks/real_size.py sd15 --scale small                          the same steps on a small network
    python benchmarks/real_size.py sd15 --peers /path/to/nncf-env/bin/python   with NNCF, from its own environment

The network is random except for its last layer, which is fitted so that it predicts something (fitted_network.py). All
subjects (subjects.py) are calibrated on the same recorded inputs and compared on others (made_models.py), each in
processes of its own: one for accuracy, and one in each of two rounds of timing, in which the subjects alternate. A
subject that runs out of memory gets a row that says so.

Prints one JSON line per process as it ends and a Markdown table at the end. WORK/<model>-race.json has all rows. A
finished step is not repeated in the same --work unless its row in WORK/<model>/rows is removed; what depends on it then
is. Ends with exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from made_models import MAKINGS, Race, needed
from race_table import markdown, subject_row, verdicts, with_ratios
from real_size_models import MODELS
from subjects import SUBJECTS, accuracy, timing

ROUNDS = 2
NOT_INSTALLED = "not installed"

Row = dict[str, Any]


class Runner:
    """Runs tasks in processes and stores their rows; a row newer than those it needs is not made again."""

    def __init__(self, race: Race, peers: Path | None) -> None:
        self._race, self._peers = race, peers
        self._command = [sys.executable, __file__, race.name, "--scale", "small" if race.small else "full"]
        self._command += ["--work", str(race.work), "--task"]
        for folder in ("rows", "logs"):
            (race.folder / folder).mkdir(parents=True, exist_ok=True)

    def make(self, step: str, rows: dict[str, Row]) -> Row:
        """Return the row of one step of making; `rows` are those of earlier steps."""
        making, command = MAKINGS[step], [*self._command, json.dumps(["make", step])]
        blocked = _blocked(making.needs, rows)
        if making.peer is not None and self._peers is None:
            blocked = NOT_INSTALLED
        elif making.peer is not None and not blocked:
            command = [str(self._peers), *making.peer(self._race)]
        return self._run(step, command, making.needs, blocked, {"step": step})

    def measure(self, subject: str, rows: dict[str, Row], phase: str, *arguments: int) -> Row:
        """Return the row of one phase of measuring a subject."""
        needs = SUBJECTS[subject].makings
        task = "-".join([subject, phase, *map(str, arguments)])
        command = [*self._command, json.dumps([phase, subject, *arguments])]
        return self._run(task, command, needs, _blocked(needs, rows), {"subject": subject, "phase": phase})

    def _run(self, task: str, command: Sequence[str], needs: Sequence[str], blocked: str, head: Row) -> Row:
        file = self._file(task)
        if not blocked and _is_newer(file, [self._file(need) for need in needs]):
            row: Row = json.loads(file.read_text()) | {"done_before": True}
        elif blocked:
            row = head | {"failed": blocked}
        else:
            file.unlink(missing_ok=True)
            row = head | run_process(command, self._race.folder / "logs" / f"{task}.log")
            if "failed" not in row:
                file.write_text(json.dumps(row))
        print(json.dumps({"model": self._race.title, **row}), flush=True)
        return row

    def _file(self, task: str) -> Path:
        return self._race.folder / "rows" / f"{task}.json"


def _blocked(needs: Sequence[str], rows: dict[str, Row]) -> str:
    """Return why a task cannot run: the first step that it needs and that failed, or ''."""
    failed = [(need, rows[need]["failed"]) for need in needs if "failed" in rows.get(need, {})]
    if not failed:
        return ""
    need, reason = failed[0]
    return reason if reason == NOT_INSTALLED else f"{need}: {reason}"


def _is_newer(file: Path, others: Sequence[Path]) -> bool:
    return file.is_file() and all(file.stat().st_mtime_ns >= other.stat().st_mtime_ns for other in others)


def run_process(command: Sequence[str], log: Path) -> Row:
    """Run a process that prints a JSON line at its end; return it, or {"failed": reason}. `log` gets its stderr."""
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stream, text=True)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {"failed": "out of memory (killed)" if name == "SIGKILL" else f"ended by {name}"}
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    return {"failed": (lines or [f"exit code {done.returncode}"])[-1][:300]}


def run_task(race: Race, task: Sequence[Any]) -> Row:
    """Run one task in this process and return its row."""
    from diffpress.runtime.benchmarking.probe import peak_mib

    phase, name, *arguments = task
    if phase == "accuracy":
        return accuracy(race, name)
    if phase == "timing":
        number, repeats = arguments
        return timing(race, name, repeats, first=number == 1)
    start, run = time.perf_counter(), MAKINGS[name].run
    assert run is not None, name
    result = run(race)
    return {"seconds": time.perf_counter() - start, "peak_mib": peak_mib(), **result}


def run_race(race: Race, names: Sequence[str], repeats: int, peers: Path | None) -> int:
    """Make, measure, print the table and return the exit code."""
    from diffpress.runtime.benchmarking.bench import machine

    runner, facts = Runner(race, peers), machine()
    print(json.dumps({"machine": facts}), flush=True)
    makings: dict[str, Row] = {}
    steps = needed([step for name in names for step in SUBJECTS[name].makings])
    for step in needed([*steps, "roofline"]) if "float" in steps else steps:
        makings[step] = runner.make(step, makings)
    if "failed" in makings["record"]:
        print(f"there is nothing to compare with: {makings['record']['failed']}", file=sys.stderr)
        return 1
    accuracies = {name: runner.measure(name, makings, "accuracy") for name in names}
    timings: dict[str, list[Row]] = {name: [] for name in names}
    for number in range(1, ROUNDS + 1):
        for name in names:
            timings[name].append(runner.measure(name, makings, "timing", number, repeats))
    rows = with_ratios([subject_row(name, makings, accuracies[name], timings[name]) for name in names])
    checks = verdicts(race.name, race.small, rows, makings)
    report = {"machine": facts, "repeats": repeats, "makings": makings, "rows": rows, "checks": checks}
    (race.work / f"{race.title}-race.json").write_text(json.dumps(report, indent=1) + "\n")
    peaks = makings.get("roofline", {}).get("peak_gmacs", {})
    network = (
        f"{makings['write']['parameters'] / 1e6:.1f}M parameters, R^2 {makings['fit']['r2']:.2f} on unseen states, "
        f"{makings['record']['evaluations']} evaluations. "
        f"Peaks: {', '.join(f'{kind} {value:.0f} GMAC/s' for kind, value in peaks.items()) or 'not measured'}."
    )
    print(f"\n{markdown(race.title, facts, network, rows, checks)}", flush=True)
    return 0 if all(check["passed"] for check in checks) else 1


def main() -> int:
    """Run the race, or one of its tasks in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="size of the network (full)")
    parser.add_argument("--work", type=Path, help="folder for all files, needs 60 GB (default: a temporary one)")
    parser.add_argument("--subjects", type=lambda text: text.split(","), default=list(SUBJECTS), metavar="A,B,...")
    parser.add_argument("--repeats", type=int, default=5, help="timed evaluations in each of two rounds (5)")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="Python of an environment with nncf and openvino")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)  # of a child process
    args = parser.parse_args()
    unknown = [name for name in args.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"unknown subject '{unknown[0]}': choose from {', '.join(SUBJECTS)}")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.peers and not args.peers.is_file():
        parser.error(f"--peers {args.peers}: no such file")
    if args.task:
        print(json.dumps(run_task(Race(args.model, args.scale == "small", args.work), args.task)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        race = Race(args.model, args.scale == "small", (args.work or Path(temporary)).resolve())
        # in the table's order, each once
        return run_race(race, [name for name in SUBJECTS if name in args.subjects], args.repeats, args.peers)


if __name__ == "__main__":
    sys.exit(main())
