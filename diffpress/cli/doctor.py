"""`diffpress doctor`: what this machine can run, and which extra to install for the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

from diffpress import __version__
from diffpress.compress.builtin import CALIB_DATA
from diffpress.runtime.errors import EXTRAS

EXAMPLE = "diffpress doctor"
VERBS_OF = {
    "compress": "plan, compress, export, evaluate",
    "openvino": "sample and bench in OpenVINO",
    "tensorrt": "build and run TensorRT engines",
    "text": "prompts, for models of text",
    "serve": "serve",
    "search": "search",
    "sign": "sign, --require-signature",
    "genai": "target genai",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress doctor`: none."""


def run(args: argparse.Namespace) -> int:
    """Print the machine, the extras and the engines, with what to do about each that is missing."""
    from diffpress.runtime.benchmarking.bench import machine
    from diffpress.runtime.engines import ENGINES

    facts = machine()
    memory = _memory_gib()
    print(f"diffpress {__version__}, Python {facts['python']}")
    print(f"machine   {facts['cpu']}, {facts['cores']} cores" + (f", {memory:.0f} GiB" if memory else ""))
    print(f"          instruction sets: {', '.join(facts['instruction_sets']) or 'unknown'}")
    print(f"          NVIDIA GPU: {'nvidia-smi found' if shutil.which('nvidia-smi') else 'none found'}")
    for extra, packages in EXTRAS.items():
        wanted = packages[:1] if extra == "tensorrt" else packages
        missing = [package for package in wanted if importlib.util.find_spec(package) is None]
        state = f"missing {', '.join(missing)}: pip install 'diffpress[{extra}]'" if missing else "installed"
        print(f"extra     {extra:<11} {state} ({VERBS_OF[extra]})")
    for name, backend in ENGINES.items():
        package, reason = backend.missing(), None
        if package is None:
            reason = backend.unusable()
        state = f"package {package} is not installed" if package else reason or f"runs here, version {_version(name)}"
        print(f"engine    {name:<11} {state}")
    print(f"data      {CALIB_DATA}" + ("" if CALIB_DATA.is_dir() else ": missing; reinstall diffpress"))
    return 0


def _version(engine: str) -> str:
    try:
        return importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _memory_gib() -> float | None:
    """Return the machine's main memory; None where the system does not say."""
    if hasattr(os, "sysconf") and Path("/proc/meminfo").is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return None
