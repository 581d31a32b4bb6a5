"""Hostile files that a command reads besides bundles and checkpoints: recipes, arrays, pictures, prompts, LoRAs."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.campaign.hostile_checkpoints import CANARY, PICKLE, Payload, bomb, torch_zip
from tests.campaign.hostile_manifests import ESCAPES, nested


def png(width: int, height: int, data: bytes | None = None, extra: bytes = b"") -> bytes:
    """Return a PNG of zeros with these sides, or with other compressed data, and chunks before it."""
    rows = zlib.compress(bytes(min(width * height + height, 2**26)), 1) if data is None else data
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def objects(content: object) -> bytes:
    """Return an npz file with an array of objects, which numpy would unpickle."""
    stream = io.BytesIO()
    np.savez(stream, x=np.array([content], dtype=object))
    return stream.getvalue()


def claimed(shape: str, descr: str = "'|u1'") -> bytes:
    """Return an npz file whose array claims a shape that its data does not have."""
    stream = io.BytesIO()
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", head + bytes(16))
    return stream.getvalue()


def archive_of(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, b"x")
    return stream.getvalue()


def laughs(key: str, levels: int) -> str:
    """Return YAML whose value of a key would expand to 10 ** levels entries."""
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return f"{key}:\n" + "\n".join(lines)


def merges(levels: int) -> str:
    """Return YAML whose merge keys refer to each other."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], y{n}: 1}}" for n in range(1, levels)]
    return "\n".join(lines)


def written(content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda file: file.write_bytes(data)


def sparse(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(2**40)


PYTHON_TAG = f"stages: !!python/object/apply:os.system ['touch {CANARY}']"

# name -> what writes the file; all of them have to be refused
RECIPES: dict[str, Callable[[Path], object]] = {
    "a recipe with a Python tag": written(PYTHON_TAG),
    "a recipe with a Python name": written("stages: !!python/name:os.system"),
    "a recipe with a Python module": written("stages: !!python/module:os"),
    **{
        f"a recipe with aliases as {key}": written(laughs(key, 9))
        for key in ("seed", "data", "stages", "teacher", "export", "gates", "evaluate", "unknown")
    },
    "a recipe with merge keys that expand": written(merges(12)),
    "a recipe that contains itself": written("stages: &a [*a]"),
    "a recipe that is its own key": written("&a {*a : 1}"),
    "a recipe nested deeply": written(f"stages: {nested(20_000)}"),
    "a recipe with escape sequences": written(f'"{ESCAPES.encode("unicode_escape").decode()}": 1'),
    "a recipe with a stage of escape sequences": written(f'stages: ["{ESCAPES.encode("unicode_escape").decode()}"]'),
    "a recipe of binary data": written(bytes(range(256))),
    "a recipe of a terabyte": sparse,
    "a recipe with a seed of a million digits": written(f"seed: {'9' * 1_000_000}"),
    "a recipe with a ratio of NaN": written("stages: [{prune: {ratio: .nan}}]"),
    "a recipe with data in /dev": written("data: /dev/zero\nstages: [{quantize: {}}]"),
    "a recipe whose features are a pickle": written("evaluate: {features: /dev/zero}"),
    "a recipe with 10**12 training steps": written("stages: [{distill: {kind: recover, steps: 1000000000000}}]"),
}

ARRAYS: dict[str, Callable[[Path], object]] = {
    "an npz of objects": written(objects(Payload())),
    "an npz that is a pickle": written(PICKLE),
    "an npz that is a torch archive": torch_zip,
    "an npz bomb of 16 GiB": lambda file: file.write_bytes(bomb((2**12, 2**11, 2**11))),
    "an npz that claims terabytes": written(claimed("(1048576, 1048576)")),
    "an npz whose size overflows": written(claimed("(4294967296, 4294967296, 4294967296)")),
    "an npz of a negative size": written(claimed("(-1, 8, 8)")),
    "an npz with code in its header": written(claimed("__import__('os').system('touch canary')")),
    "an npz of an object type": written(claimed("(2,)", "'|O'")),
    "an npz with a header nested deeply": written(claimed("(" * 5000 + ")" * 5000)),
    "an npz with a name outside": written(archive_of("../../x.npy")),
    "an npz with a name of escape sequences": written(archive_of(f"{ESCAPES}.npy")),
    "an npz of a terabyte of zeros": sparse,
}

PICTURES: dict[str, Callable[[Path], object]] = {
    "a PNG of 60,000 x 60,000 pixels": written(png(60_000, 60_000)),
    "a PNG of 12,000 x 12,000 pixels": written(png(12_000, 12_000)),
    "a PNG of 2**31 - 1 pixels a side": written(png(2**31 - 1, 2**31 - 1)),
    "a PNG of no pixels": written(png(0, 0)),
    "a PNG whose data is short": written(png(64, 64, zlib.compress(b"x"))),
    "a PNG with a text that expands": written(
        png(8, 8, extra=chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**27), 9)))
    ),
    "a PNG with a profile that expands": written(
        png(8, 8, extra=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**27), 9)))
    ),
    "a picture that is a pickle": written(PICKLE),
    "a picture of a terabyte": sparse,
    "a picture that is PostScript": written("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(canary) (w) file\n"),
}

PROMPTS: dict[str, Callable[[Path], object]] = {
    "prompts of a terabyte": sparse,
    "prompts of binary data": written(bytes(range(256)) * 10),
    "prompts of UTF-16": written("a cat".encode("utf-16")),
}

LORAS: dict[str, Callable[[Path], object]] = {
    "a LoRA that is a pickle": written(PICKLE),
    "a LoRA that is a torch archive": torch_zip,
    "a LoRA with a header of terabytes": written(struct.pack("<Q", 2**42) + b"{}"),
    "a LoRA without tensors": written(struct.pack("<Q", 2) + b"{}"),
    "a LoRA of protocol 5": written(pickle.dumps(Payload(), 5)),
}
