"""`diffpress info`: what a checkpoint or bundle is."""

from __future__ import annotations

import argparse
import json
from typing import Any

from diffpress.cli.arguments import add_signature_argument
from diffpress.cli.console import printable

EXAMPLE = "diffpress info work/bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress info`."""
    parser.add_argument("path", metavar="CHECKPOINT_OR_BUNDLE", help="folder of a checkpoint or bundle")
    add_signature_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the description, one fact per line."""
    from diffpress.compress.info import describe

    facts = describe(args.path, args.public_key)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for name, text in _lines(facts):
        print(f"{name:<13} {printable(text)}")
    return 0


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    plan = facts["plan"]
    guidance = "" if plan["guidance"] == 1 else f", guidance {plan['guidance']:g}"
    cache = plan["step_cache"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in cache["steps"].items()) if cache else ""
    cached = f", step cache: {kinds} ({cache['cut'] or 'order {order}'.format(**cache)})" if cache else ""
    corrected = ", output corrections" if plan["output_corrections"] else ""
    pixels = "" if facts["image_size"] is None else "{}x{} pixels, ".format(*facts["image_size"])
    engines = [
        f"{entry['engine']} {entry.get('version', '')}".strip()
        + (f" ({entry['integer_mac_share']:.1%} integer MACs)" if entry.get("integer_mac_share") else "")
        for entry in facts["engines"]
    ]
    lines = [
        (facts["kind"], f"{facts['path']}" + (f" (format {facts['format']})" if facts["format"] else "")),
        ("family", facts["family"] or "not recorded"),
        ("precision", facts["precision"] or "not recorded"),
        ("parameters", "not recorded" if facts["parameters"] is None else f"{facts['parameters']:,}"),
        ("size", f"{facts['size_mib']:.2f} MiB"),
        ("image", f"{pixels}samples {facts['sample_shape']}, {facts['prediction']} prediction"),
        ("conditioning", facts["conditioning"]),
        ("plan", f"{plan['steps']} steps of {plan['solver']}{guidance}{corrected}{cached}"),
        ("history", " -> ".join(facts["history"]) or "none"),
    ]
    if facts["distilled"]:
        lines.append(("distilled", facts["distilled"]))
    if facts["components"]:
        lines.append(("components", ", ".join(facts["components"])))
    if facts["signature"]:
        checked = "checked" if facts["signature"]["checked"] else "not checked, see --require-signature"
        lines.append(("signature", f"key {facts['signature']['key'][:16]} ({checked})"))
    if engines:
        lines.append(("engines", "; ".join(engines)))
    return lines
