"""Licence and terms of use that come with a checkpoint: they are kept in every checkpoint and bundle made from it.

Their files are those in the checkpoint's own folder whose names begin with LICENSE, NOTICE, USE_POLICY and the like,
and the model card, README.md, which names the licence on the hub. A single file states its licence in its header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError

CARD = "README.md"
BASE_CARD = "BASE_README.md"  # its name in a bundle, which has a card of its own
PATTERNS = tuple(  # of the hub, which distinguishes upper and lower case
    pattern
    for stem in ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY", "USE-POLICY", "ACCEPTABLE_USE", "TERMS")
    for pattern in (f"{stem}*", f"{stem.lower()}*", f"{stem.capitalize()}*")
)
NAME = re.compile(r"(licen[sc]e|copying|notice|use[-_ ]?policy|acceptable[-_ ]?use|terms)(?![a-z]).*", re.IGNORECASE)
NO_TEXT = (".py", ".json", ".npz", ".safetensors", ".png", ".jpg")
HEADER_ENTRIES = ("modelspec.license", "license")

Terms = dict[str, bytes]


def read_terms(folder: Path) -> Terms:
    """Return file name -> content of the licence files and the model card in `folder`.

    Raises:
        InvalidInputError: One of them cannot be read.
    """
    found = {}
    for file in sorted(folder.iterdir()):
        if (NAME.fullmatch(file.name) and file.suffix.lower() not in NO_TEXT) or file.name == CARD:
            try:
                if file.is_file():
                    found[file.name] = file.read_bytes()
            except OSError as error:
                raise InvalidInputError(f"{file}: not readable ({error.strerror}); bundles must contain it") from error
    return found


def stated_terms(metadata: Mapping[str, str]) -> Terms:
    """Return the licence that the header of a single file states, as a file."""
    stated = [metadata[entry] for entry in HEADER_ENTRIES if metadata.get(entry, "").strip()]
    return {"LICENSE.txt": f"Licence stated in the checkpoint's header: {stated[0]}\n".encode()} if stated else {}


def write_terms(terms: Mapping[str, bytes], folder: Path, card: str = CARD) -> None:
    """Write the files of `read_terms` into `folder`, the model card under the name `card`."""
    for name, content in terms.items():
        (folder / (card if name == CARD else name)).write_bytes(content)
