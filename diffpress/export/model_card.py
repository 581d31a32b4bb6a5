"""README.md of a bundle: what it is, how to sample it, what was measured, and under which licence it stands.

The hub shows it as the model card, and reads the block of YAML at its top. It only repeats what the manifest and the
scores of the run say, so it is not among the bundle's verified files and does not change the bundle's hash.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffpress.compress.evaluation.summary import spread
from diffpress.compress.models.components import DECODER
from diffpress.compress.sources.terms import BASE_CARD, CARD
from diffpress.export.verify.gate import failures_of
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.io.files import write_text
from diffpress.runtime.requested_plan import plan_description

PICTURE = "samples.png"
LICENCE_ENTRIES = ("license", "license_name", "license_link")  # as the hub spells them
MARK = "---"  # around the block of YAML

Row = tuple[str, str]


def write_model_card(bundle: Bundle, scores: Mapping[str, Any] | None = None, picture: Path | None = None) -> None:
    """Write README.md into the bundle's folder, and the picture beside it.

    Args:
        bundle: The bundle.
        scores: Scores of the run, {"baseline": ..., "bundle": ...}; None if there are none.
        picture: PNG that compares samples of the uncompressed model with the bundle's.
    """
    if CARD in bundle.manifest["files"]:
        return  # an older bundle, in which this is the verified card of the checkpoint
    shown = bundle.path / PICTURE
    if picture is not None and picture.is_file():
        shutil.copyfile(picture, shown)
    else:
        shown.unlink(missing_ok=True)
    sections = [
        _front_matter(bundle),
        f"# {_plain(bundle.manifest['name'])}",
        f"A {_plain(bundle.manifest['family'])} diffusion model as engines: ONNX graphs with everything that is needed "
        "to sample from them without torch, made by diffpress.",
    ]
    if shown.is_file():
        sections.append(
            f"![samples]({PICTURE})\n\nTop: the uncompressed model. Bottom: this bundle, from the same noise."
        )
    failed = [failure.message for failure in failures_of(bundle) if failure.target]
    if failed:
        sections.append("**Parity failed:** " + "; ".join(map(_plain, failed)) + ". Do not deploy this bundle.")
    sections += ["## Use", _use(bundle), "## Facts", _table(("", ""), _facts(bundle))]
    if scores is not None and (rows := _quality(scores)):
        sections += ["## Quality", _table(("", "uncompressed", "this bundle"), rows)]
    if bundle.manifest["history"]:
        sections += ["## How it was made", _table(("stage", "parameters", "MACs"), _stages(bundle))]
    sections += ["## Licence", _licence(bundle)]
    write_text(bundle.path / CARD, "\n\n".join(sections) + "\n")


def _front_matter(bundle: Bundle) -> str:
    conditioning = bundle.spec.conditioning
    precision = bundle.manifest["graphs"]["denoiser"]["precision"]
    entries: dict[str, Any] = {"library_name": "diffpress", "tags": ["diffpress", "onnx", "diffusion", precision]}
    if bundle.spec.is_picture or DECODER in bundle.manifest["graphs"]:
        is_text = conditioning.kind == "text"
        entries["pipeline_tag"] = "text-to-image" if is_text else "unconditional-image-generation"
    if conditioning.inpainting:
        entries["pipeline_tag"] = "image-to-image"
    entries |= base_licence(bundle.path)
    return f"{MARK}\n{yaml.safe_dump(entries, sort_keys=False)}{MARK}"


def base_licence(folder: Path) -> dict[str, str]:
    """Return the licence entries of the model card that the checkpoint came with; empty if it states none."""
    try:
        lines = (folder / BASE_CARD).read_text(encoding="utf-8").splitlines()
        end = lines.index(MARK, 1)
        block = yaml.safe_load("\n".join(lines[1:end])) if lines[0] == MARK else None
    except (OSError, UnicodeDecodeError, ValueError, IndexError, yaml.YAMLError):
        return {}  # a card is prose: one without a readable block states nothing
    if not isinstance(block, dict):
        return {}
    return {name: block[name] for name in LICENCE_ENTRIES if isinstance(block.get(name), str)}


def _use(bundle: Bundle) -> str:
    conditioning = bundle.spec.conditioning
    argument = {"text": '"a lighthouse in the fog", ', "class": "labels=0, "}.get(conditioning.kind, "")
    if conditioning.tensors:
        argument += f"conditioning={{{', '.join(f'{name!r}: ...' for name in conditioning.tensors)}}}, "
    if conditioning.inpainting:
        argument += 'image="image.png", mask="mask.png", '
    extras = "openvino,text" if conditioning.encoders else "openvino"
    return (
        f"```sh\npip install 'diffpress[{extras}]'\n```\n\n"
        "```python\nimport diffpress as dp\n\n"
        'with dp.Pipeline("FOLDER") as pipe:  # the folder with this file\n'
        f"    images = pipe({argument}seeds=range(4))\n```"
    )


def _facts(bundle: Bundle) -> list[Row]:
    manifest, spec = bundle.manifest, bundle.spec
    denoiser = manifest["graphs"]["denoiser"]
    guidance = "" if spec.plan.guidance <= 1 else f", guidance {spec.plan.guidance:g}"
    rows = [
        ("precision", denoiser["precision"]),
        ("parameters of the denoiser", f"{denoiser['parameters']:,}"),
        ("sampling plan", plan_description(spec) + guidance),
    ]
    if spec.plan.cache is not None:
        counts = ", ".join(f"{count} {kind}" for kind, count in spec.plan.cache.counts.items())
        rows.append(("steps evaluate", counts))
    if spec.distilled:
        rows.append(("distilled", spec.distilled))
    rows += [(f"{name}, MiB", f"{entry['bytes'] / 2**20:.2f}") for name, entry in manifest["graphs"].items()]
    for name, what in (("parameters_ratio", "parameters"), ("macs_ratio", "MACs")):
        if name in manifest["metrics"]:
            rows.append((f"{what}, fraction of the uncompressed model's", f"{manifest['metrics'][name]:.3f}"))
    for entry in manifest["engines"]:
        if entry.get("integer_mac_share") is not None:
            rows.append((f"integer MAC share in {entry['engine']}", f"{entry['integer_mac_share']:.3f}"))
    for engine, row in manifest["parity"].items():
        rows.append((f"SQNR of the samples to torch, {engine}", f"{row['sqnr_db']:.1f} dB"))
    return rows


def _quality(scores: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of what was scored; paired scores compare the bundle with the uncompressed model."""
    before, after = scores.get("baseline") or {}, scores["bundle"]
    rows = []
    if after.get("frechet") and before.get("frechet"):
        count = f"{after['seeds']} x {after['samples']}, real images {after['frechet']['floor']:.3f}"
        what = f"Fréchet distance in features {_plain(after['features']['name'])} ({count})"
        rows.append((what, spread(before["frechet"]), spread(after["frechet"])))
        rows.append(("KID", spread(before["kid"], 4), spread(after["kid"], 4)))
    for name, what in (("clip_score", "CLIP score"), ("retrieval", "retrieval accuracy")):
        if name in after and name in before:
            rows.append((what, spread(before[name]), spread(after[name])))
    if after.get("paired"):
        rows.append(("PSNR to the uncompressed model, same noise and plan", "", f"{after['paired']['psnr_db']:.1f} dB"))
        rows.append(("SSIM to the uncompressed model", "", f"{after['paired']['ssim']:.3f}"))
    return rows


def _stages(bundle: Bundle) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for record in bundle.manifest["history"]:
        kind = record["config"].get("kind") or record["config"].get("format")
        name = record["stage"] if kind is None else f"{record['stage']}: {kind}"
        counts = [record["changed"].get(what) for what in ("parameters", "macs")]
        rows.append((_plain(name), *("" if count is None else f"{count[1]:,}" for count in counts)))
    return rows


def _licence(bundle: Bundle) -> str:
    stated = base_licence(bundle.path).get("license")
    # the engines and the card are ours, everything else at the top of the folder came with the checkpoint
    files = sorted(
        name for name in bundle.manifest["files"] if "/" not in name and not name.endswith((".onnx", ".data", ".json"))
    )
    lines = [
        f"The checkpoint stands under `{_plain(stated)}`, and so does this bundle."
        if stated
        else "The licence of the checkpoint applies to this bundle."
    ]
    if files:
        lines.append("Files that came with the checkpoint: " + ", ".join(f"`{_plain(name)}`" for name in files) + ".")
    else:
        lines.append("It came without licence files.")
    return " ".join(lines)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: object) -> str:
    """Return a name without characters that mean something in Markdown or HTML, on one line."""
    return "".join(character for character in str(text) if character.isalnum() or character in " .,:;+-_()/")
