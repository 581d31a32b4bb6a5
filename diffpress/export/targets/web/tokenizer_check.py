"""Which tokenizers page/tokenizer.js has: byte-level BPE as in CLIP. Others are refused before any work."""

from __future__ import annotations

from typing import Any

from diffpress.runtime.errors import InvalidInputError

# CLIP's
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPACES = {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}
NORMALIZERS = [{"type": "NFC"}, SPACES, {"type": "Lowercase"}]


def check_tokenizer(name: str, content: dict[str, Any]) -> None:
    """Check that the page can tokenize as this tokenizer does.

    Args:
        name: Name of the tokenizer in messages.
        content: Its tokenizer.json.

    Raises:
        InvalidInputError: It cannot.
    """
    difference = _difference(content)
    if difference is not None:
        raise InvalidInputError(
            f"target web: {name} has {difference}; the page has CLIP's tokenizer only, so leave the target out"
        )


def _difference(content: dict[str, Any]) -> str | None:
    """Return what differs from CLIP's tokenizer; None if nothing does."""
    model, special = content["model"], content.get("post_processor") or {}
    splitters = (content.get("pre_tokenizer") or {}).get("pretokenizers", [])
    kinds = [step["type"] for step in splitters]
    added = {token["content"]: token for token in content["added_tokens"]}
    options = {"lstrip", "rstrip", "single_word", "normalized"}
    found = {
        f"a {model['type']} model": model["type"] != "BPE",
        "another normalization": (content.get("normalizer") or {}).get("normalizers") != NORMALIZERS,
        "another way to split words": (
            kinds != ["Split", "ByteLevel"]
            or splitters[0]["pattern"] != {"Regex": WORDS}
            or splitters[1].get("add_prefix_space", False)
        ),
        f"special tokens of kind {special.get('type')}": special.get("type") != "RobertaProcessing",
        "no </w> at the end of words": model.get("end_of_word_suffix") != "</w>",
        "merges with options": bool(model.get("continuing_subword_prefix") or model.get("dropout"))
        or bool(model.get("fuse_unk") or model.get("byte_fallback") or model.get("ignore_merges")),
        "added tokens with options": any(token.get(option) for token in added.values() for option in options),
        "textual inversions of several vectors": any(f"{token}_1" in added for token in added),
    }
    return next((what for what, is_found in found.items() if is_found), None)
