"""Load time and peak memory of a bundle, measured in a fresh process.

    python -m diffpress.runtime.benchmarking.probe BUNDLE --engine E --batch B --options JSON
    prints {"load_ms": ..., "peak_mib": ...}

`load_ms` is the time from the bundle's folder to the first finished network evaluation at that batch size: importing
the engine, verifying hashes, reading, compiling and running. `peak_mib` is the peak memory of the process, which then
also samples one batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffpress.runtime.errors import DiffpressError, InvalidInputError

if TYPE_CHECKING:
    from diffpress.runtime.engines.options import EngineOptions


class Probe(NamedTuple):
    """Load time and peak resident memory of a fresh process; None if the system does not report memory."""

    load_ms: float
    peak_mib: float | None


def probe(bundle: Path, engine: str, batch: int, options: EngineOptions | None = None) -> Probe:
    """Measure a bundle in a fresh Python process; raises InvalidInputError with its last error line if it fails."""
    command = [
        sys.executable,
        "-m",
        "diffpress.runtime.benchmarking.probe",
        str(bundle.resolve()),
        "--engine",
        engine,
        "--batch",
        str(batch),
    ]
    if options is not None:
        command += ["--options", json.dumps(options.to_json())]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    if completed.returncode != 0:
        reason = (completed.stderr.strip().splitlines() or ["no output"])[-1]
        raise InvalidInputError(f"{bundle}: measuring it in a separate process failed: {reason}")
    return Probe(**json.loads(completed.stdout.splitlines()[-1]))


def measure_here(bundle_path: Path, engine_name: str | None, batch: int, options: dict[str, Any]) -> Probe:
    """Measure in this process, which must not have completed anything else."""
    start = time.perf_counter()
    from diffpress.runtime.bundle import load_bundle
    from diffpress.runtime.engines import open_engine
    from diffpress.runtime.engines.options import EngineOptions
    from diffpress.runtime.network_inputs import dummy_conditioning
    from diffpress.runtime.sampler import generate, warm_up

    bundle = load_bundle(bundle_path)
    with closing(open_engine(bundle, engine_name, options=EngineOptions.from_json(options))) as engine:
        spec = bundle.spec_for(engine.name)
        warm_up(engine, spec, batch)
        load_ms = (time.perf_counter() - start) * 1e3
        conditioning = dummy_conditioning(spec, batch)
        generate(engine, spec, seeds=range(batch), batch=batch, conditions=conditioning)
    return Probe(load_ms, peak_mib())


def peak_mib() -> float | None:
    """Return the peak resident memory of this process in MiB, or None if the system does not report it.

    Linux's VmHWM counts this program only; getrusage's maximum also counts the parent process it was forked from.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def main() -> int:
    """Run the measurement from the command line and print it as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m diffpress.runtime.benchmarking.probe")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    try:
        found = measure_here(args.bundle, args.engine, args.batch, args.options)
    except DiffpressError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{json.dumps(found._asdict())}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
