"""Hostile checkpoints: each function changes a copy of an intact pipeline folder of diffusers.

Payloads that would run write a file called CANARY; the campaign looks for it after each trial.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.campaign.hostile_manifests import ESCAPES, nested

CANARY = "canary"
WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
TEXT_WEIGHTS = Path("text_encoder", "model.safetensors")
Change = Callable[[Path], object]


class Payload:
    """An object whose unpickling writes the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


PICKLE = pickle.dumps({"weight": Payload()})
PYTHON = f"open({CANARY!r}, 'w').close()\nclass Model: pass\n"


def torch_zip(file: Path) -> None:
    """Write what torch.save writes: a zip archive with a pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)
        archive.writestr("archive/version", "3\n")


def only_pickle(name: str, folder_name: str = "unet") -> Change:
    """Replace a component's weights by a pickle of this name."""

    def change(folder: Path) -> None:
        for file in (folder / folder_name).glob("*.safetensors"):
            file.unlink()
        (folder / folder_name / name).write_bytes(PICKLE)

    return change


def zip_as_safetensors(folder: Path) -> None:
    torch_zip(folder / WEIGHTS)


def header(content: bytes, length: int | None = None, data: bytes = b"", file: Path = WEIGHTS) -> Change:
    """Write a safetensors file with this header, which claims to be `length` bytes long."""

    def change(folder: Path) -> None:
        size = len(content) if length is None else length
        (folder / file).write_bytes(struct.pack("<Q", size) + content + data)

    return change


def tensors(entries: dict[str, Any], data: bytes = bytes(64), file: Path = WEIGHTS) -> Change:
    return header(json.dumps(entries).encode(), data=data, file=file)


def changed_header(change_entries: Callable[[dict[str, Any]], object], file: Path = WEIGHTS) -> Change:
    """Change the entries of the intact header."""

    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + size])
        change_entries(entries)
        tensors(entries, content[8 + size :], file)(folder)

    return change


def _first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in entries.items() if name != "__metadata__")


def overlapping(entries: dict[str, Any]) -> None:
    same = _first(entries)["data_offsets"]
    for name, entry in entries.items():
        if name != "__metadata__":
            entry["data_offsets"] = same


def config(name: str, **entries: Any) -> Change:
    """Change entries of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | entries))

    return change


def replaced(name: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def older_tokenizer(name: str, content: bytes) -> Change:
    """Replace a file of a tokenizer that is stored in the older format alone."""

    def change(folder: Path) -> None:
        (folder / "tokenizer" / "tokenizer.json").unlink()
        (folder / "tokenizer" / name).write_bytes(content)

    return change


def code_beside(name: str, entries: dict[str, Any], module: str) -> Change:
    """Name a class of a Python file that lies in the folder, as remote code is named."""

    def change(folder: Path) -> None:
        config(name, **entries)(folder)
        for place in (folder, folder / "unet", folder / "text_encoder", folder / "tokenizer"):
            (place / f"{module}.py").write_text(PYTHON)
            (place / "__init__.py").write_text(PYTHON)

    return change


def index_of(weights: str) -> Change:
    """An index of shards that names a file elsewhere."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        target = str(folder.parent / "outside.safetensors") if weights == "absolute" else weights
        index = {"metadata": {}, "weight_map": {"conv_in.weight": target}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return change


def record(**entries: Any) -> Change:
    """Add a diffpress.json."""
    return lambda folder: (folder / "diffpress.json").write_text(json.dumps({"format": 2, **entries}))


def custom_record(folder: Path) -> None:
    (folder / "model.py").write_text(PYTHON)
    record(kind="custom", file="model.py", spec={})(folder)


def looping_links(folder: Path) -> None:
    (folder / "text_encoder" / "loop").symlink_to("..")


def bomb(sides: tuple[int, ...]) -> bytes:
    """Return a compressed npz file whose array of zeros has this shape, written in pieces."""
    from io import BytesIO

    stream = BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": sides})
        for _ in range(int(np.prod(sides)) // 2**24):
            file.write(bytes(2**24))
    return stream.getvalue()


UNET, TEXT, TOKENIZER = "unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"
INDEX = "model_index.json"

# name -> change, and whether the checkpoint has to be refused
CHECKPOINTS: dict[str, tuple[Change, bool]] = {
    **{
        f"a pickle named {name}": (only_pickle(name), True)
        for name in (
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.pt",
            "model.ckpt",
            "model.pkl",
            "model.safetensors",
            "pytorch_model.bin",
        )
    },
    "a text encoder as a pickle": (only_pickle("pytorch_model.bin", "text_encoder"), True),
    "a text encoder as a pickle named safetensors": (only_pickle("model.safetensors", "text_encoder"), True),
    "a torch archive named safetensors": (zip_as_safetensors, True),
    "a header of terabytes": (header(b"{}", 2**42), True),
    "a header of 2**64 - 1 bytes": (header(b"{}", 2**64 - 1), True),
    "a header of zero bytes": (header(b"", 0), True),
    "a header nested deeply": (header(nested(100_000).encode()), True),
    "a header that is a list": (header(b"[]"), True),
    "tensors that overlap": (changed_header(overlapping), True),
    "a tensor of terabytes": (
        changed_header(lambda entries: _first(entries).update(shape=[2**21, 2**21], data_offsets=[0, 2**44])),
        True,
    ),
    "a tensor whose size overflows": (changed_header(lambda e: _first(e).update(shape=[2**33, 2**33])), True),
    "a tensor whose offsets are swapped": (changed_header(lambda e: _first(e)["data_offsets"].reverse()), True),
    "a tensor with a negative offset": (changed_header(lambda e: _first(e).update(data_offsets=[-4, 4])), True),
    "a tensor of an unknown type": (changed_header(lambda e: _first(e).update(dtype="OBJECT")), True),
    "a tensor name with escape sequences": (
        changed_header(
            lambda entries: entries.update({ESCAPES: _first(entries) | {"shape": [0], "data_offsets": [0, 0]}})
        ),
        True,
    ),
    "metadata of a wrong type": (changed_header(lambda e: e.update(__metadata__={"format": ["pt"]})), True),
    "overlapping tensors of the text encoder": (changed_header(overlapping, TEXT_WEIGHTS), True),
    "shards in the parent folder": (index_of("../../outside.safetensors"), True),
    "shards at an absolute path": (index_of("absolute"), True),
    "a network of 10**9 channels": (config(UNET, block_out_channels=[10**9, 10**9]), True),
    "a network of 10**6 layers per block": (config(UNET, layers_per_block=10**6), True),
    "a network of 2**70 channels": (config(UNET, block_out_channels=[2**70, 2**70]), True),
    "a network of -8 channels": (config(UNET, block_out_channels=[-8, -8]), True),
    "a network without blocks": (config(UNET, down_block_types=[], up_block_types=[]), True),
    "a class that is a function of Python": (config(UNET, _class_name="os.system"), False),
    "a class of another module": (config(INDEX, unet=["os", "system"]), True),
    "a text encoder of another module": (config(INDEX, text_encoder=["subprocess", "Popen"]), True),
    "a tokenizer of another module": (config(INDEX, tokenizer=["builtins", "exec"]), True),
    "a pipeline of a file in the folder": (code_beside(INDEX, {"_class_name": ["evil", "Model"]}, "evil"), True),
    "a network of a file in the folder": (code_beside(INDEX, {"unet": ["evil", "Model"]}, "evil"), True),
    "remote code of the text encoder": (
        code_beside(TEXT, {"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}, "evil"),
        False,
    ),
    "remote code of the tokenizer": (
        code_beside(
            TOKENIZER, {"auto_map": {"AutoTokenizer": ["evil.Model", None]}, "tokenizer_class": "Model"}, "evil"
        ),
        False,
    ),
    "a text encoder of 10**9 channels": (config(TEXT, hidden_size=10**9), True),
    "a text encoder of 10**7 layers": (config(TEXT, num_hidden_layers=10**7), True),
    "a vocabulary of 10**12 tokens": (config(TEXT, vocab_size=10**12), True),
    "a config nested deeply": (replaced(UNET, nested(100_000)), True),
    "a config of NaN": (config(UNET, norm_eps=float("nan")), False),
    "a config that is a list": (replaced(UNET, "[]"), True),
    "an index nested deeply": (replaced(INDEX, nested(100_000)), True),
    "a class with escape sequences": (config(UNET, _class_name=ESCAPES), False),
    "a pipeline class with escape sequences": (config(INDEX, _class_name=ESCAPES), True),
    "a scheduler of another module": (config("scheduler/scheduler_config.json", _class_name="os.system"), False),
    "a noise schedule of 10**12 timesteps": (
        config("scheduler/scheduler_config.json", num_train_timesteps=10**12),
        True,
    ),
    "a noise schedule of betas of NaN": (config("scheduler/scheduler_config.json", beta_end=float("nan")), True),
    "a record of a custom module": (custom_record, True),
    "a record of another format": (record(format="\x1b[2J"), True),
    "a record nested deeply": (replaced("diffpress.json", nested(100_000)), True),
    "a record with a pipeline elsewhere": (record(pipeline="../../../etc"), False),
    "a record with a hostile plan": (record(plan={"solver": ESCAPES, "steps": 10**12}), True),
    "a record with a plan of 10**12 steps": (record(plan={"solver": "ddim", "steps": 10**12}), True),
    "a vocabulary that is no JSON": (older_tokenizer("vocab.json", b"\xff" * 100), True),
    "a vocabulary nested deeply": (older_tokenizer("vocab.json", nested(100_000).encode()), True),
    "merges of binary data": (older_tokenizer("merges.txt", bytes(range(256)) * 40), True),
    "a tokenizer.json nested deeply": (replaced("tokenizer/tokenizer.json", nested(100_000)), True),
    "a tokenizer.json of zeros": (replaced("tokenizer/tokenizer.json", bytes(4096)), True),
    "a folder that links to its parent": (looping_links, False),
}
