"""Write MANIFEST.json of the data folder: a hash, a size, a licence and a source for each file that ships.

    python examples/data_manifest.py --data calib_data

The scripts that make the files (make_calib_data.py, make_icon_data.py) write it at their end. It prints the rows of the
table in the folder's README.
"""

import argparse
import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path

FASHION = "Fashion-MNIST, Zalando Research"
FROM_FASHION = "made for this project from Fashion-MNIST training images"
ICONS = "Fluent Emoji, Microsoft Corporation (flat; MIT), and Noto Emoji, Google Inc (shaded; Apache-2.0)"
FROM_ICONS = f"made for this project from {ICONS}"
UNLISTED = ("README.md", "MANIFEST.json")

# Pattern of files -> licence and source. Every file matches exactly one.
PROVENANCE = {
    "teacher/*": ("Apache-2.0", FROM_FASHION),
    "student/*": ("Apache-2.0", FROM_FASHION),
    "calibration.npz": ("MIT", f"{FASHION}: 2048 of the 60,000 training images"),
    "features.onnx": ("Apache-2.0", FROM_FASHION),
    "reference.npz": ("MIT", f"{FASHION}: the 10,000 test images through features.onnx"),
    "prompts.txt": ("Apache-2.0", "written for this project"),
    "icons/teacher/*": ("Apache-2.0", FROM_ICONS),
    "icons/student/*": ("Apache-2.0", FROM_ICONS),
    "icons/features/*": ("Apache-2.0", FROM_ICONS),
    "icons/calibration.npz": ("MIT AND Apache-2.0", f"{ICONS}: 512 compositions"),
    "icons/reference.npz": ("MIT AND Apache-2.0", f"{ICONS}: 4,560 compositions through icons/features/model.onnx"),
    "icons/*.txt": ("MIT AND Apache-2.0", f"names of {ICONS}"),
    "licences/Fashion-MNIST.txt": ("MIT", "its licence"),
    "licences/Fluent-Emoji.txt": ("MIT", "its licence"),
    "licences/Noto-Emoji.txt": ("Apache-2.0", "its licence"),
}


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def manifest(folder: Path) -> dict[str, dict[str, str | int]]:
    """Return {path: {sha256, bytes, licence, source}} of every file.

    Raises:
        SystemExit: A file has no provenance.
    """
    entries: dict[str, dict[str, str | int]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name in UNLISTED:
            continue
        found = [provenance for pattern, provenance in PROVENANCE.items() if fnmatch(name, pattern)]
        if len(found) != 1:
            raise SystemExit(f"{file}: fits {len(found)} entries of PROVENANCE in {Path(__file__).name}, must fit one")
        licence, source = found[0]
        size = file.stat().st_size
        entries[name] = {"sha256": fingerprint(file), "bytes": size, "licence": licence, "source": source}
    return entries


def write_manifest(folder: Path) -> None:
    """Write MANIFEST.json and print the rows of the table in the folder's README."""
    entries = manifest(folder)
    write_json(folder / "MANIFEST.json", entries)
    for name, entry in entries.items():
        size, licence, source, sha256 = (entry[key] for key in ("bytes", "licence", "source", "sha256"))
        print(f"| `{name}` | {size:,} | {licence} | {source} | `{sha256}` |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the manifest of the data folder.")
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    write_manifest(parser.parse_args(argv).data)


if __name__ == "__main__":
    main()
