"""What loading costs, measured where it is honest: in a fresh process.

    python -m diffpress.runtime.benchmarking.probe BUNDLE --engine E --batch B --options JSON     prints {"load_ms": ..., "peak_mib": ...}

`load_ms` runs from the bundle's folder to the first finished call of the network at that batch size:
importing the engine, verifying hashes, reading, compiling, running. `peak_mib` is the most memory the process
held while it then sampled one whole batch.
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
    """Load time and peak resident memory of one fresh process (None where the system keeps no count)."""

    load_ms: float
    peak_mib: float | None


def probe(bundle: Path, engine: str, batch: int, options: EngineOptions | None = None) -> Probe:
    """Measure a bundle in a fresh Python process; InvalidInputError with that process's last line where it fails."""
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
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InvalidInputError(f"{bundle}: measuring it in a process of its own failed: {reason}")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(bundle_path: Path, engine_name: str | None, batch: int, options: dict[str, Any]) -> Probe:
    """The measurement itself, meaningful in a process that has done nothing else."""
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
    """The most memory this process ever held, in MiB.

    Linux's VmHWM belongs to this program alone; getrusage's maximum also counts the parent it was forked
    from.
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
    parser = argparse.ArgumentParser(prog="python -m diffpress.runtime.benchmarking.probe")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    try:
        found = measure_here(args.bundle, args.engine, args.batch, args.options)
    except DiffpressError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(found._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
