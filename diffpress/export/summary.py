"""Text summary of a bundle."""

from __future__ import annotations

from diffpress.export.targets.tensorrt import tensorrt_line
from diffpress.export.targets.web.target import web_line
from diffpress.export.verify.engine_check import engine_check_line
from diffpress.export.verify.gate import failures_of
from diffpress.runtime.bundle import Bundle


def summary(bundle: Bundle) -> list[str]:
    """Summarize a bundle in a few lines: files with sizes, quantized layers, engines, parity."""
    manifest = bundle.manifest
    denoiser = manifest["graphs"]["denoiser"]
    lines = [f"{bundle.path}: {manifest['name']}, {denoiser['parameters']:,} parameters, {denoiser['precision']}"]
    lines += [f"  {name}  {entry['bytes'] / 2**20:.2f} MiB" for name, entry in manifest["files"].items()]
    if denoiser["formats"]:
        lines.append("  layers: " + ", ".join(f"{count} in {kind}" for kind, count in denoiser["formats"].items()))
    weights = ", ".join(f"{dtype} {size / 2**20:.2f} MiB" for dtype, size in denoiser["bytes_by_precision"].items())
    lines.append(f"  weights: {weights}")
    if slots := bundle.slots():
        layers = sum(len((bundle.slots(name) or {"layers": ()})["layers"]) for name in manifest["graphs"])
        lines.append(f"  LoRA slots: {slots['slots']} of rank {slots['rank']} beside {layers} layers")
    for entry in manifest["engines"]:
        lines.append("  " + (engine_check_line(entry) if "integer_mac_share" in entry else tensorrt_line(entry)))
    for engine, row in manifest["parity"].items():
        size = f"{row['samples']} samples, {row['steps']} steps"
        lines.append(f"  parity {engine}: {size}, largest difference {row['max_abs']:g}, SQNR {row['sqnr_db']:.1f} dB")
    if row := manifest.get("sampler", {}).get("parity"):
        size = f"{row['samples']} samples, {row['steps']} steps"
        lines.append(
            f"  {manifest['sampler']['file']} against the runtime: {size}, largest difference {row['max_abs']:g}, "
            f"SQNR {row['sqnr_db']:.1f} dB"
        )
    if entry := manifest.get("web"):
        lines.append("  " + web_line(entry))
    for failure in failures_of(bundle):
        lines.append(f"  parity FAILED{'' if failure.target else ' (not a target)'}: {failure.message}")
    for engine, entry in denoiser["variants"].items():
        parity = f": parity SQNR {entry['parity']['sqnr_db']:.1f} dB" if "parity" in entry else ""
        lines.append(f"  {engine} runs {entry['file']}, {entry['precision']}{parity}")
    for name, graph in manifest["graphs"].items():
        for engine, sqnr_db in graph.get("parity", {}).items():
            lines.append(f"  parity {engine}: {name}, SQNR {sqnr_db:.1f} dB")
    return lines
