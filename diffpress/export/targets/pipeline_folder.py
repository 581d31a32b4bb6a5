"""The files by which other tools recognise a bundle: a pipeline folder of ONNX graphs, as optimum reads it.

model_index.json, scheduler/          as in the checkpoint; parts that sampling needs not are left out
tokenizer*/                           tokenizer.json for our runtime; vocabulary and merges for slow tokenizers
unet/model.onnx, config.json          a second small graph file over the weights that denoiser.onnx refers to:
unet/model.onnx_data                  the weights lie here once
vae_decoder/, text_encoder*/          the same
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffpress.compress.sources.layout import INDEX, USED, Layout, link_or_copy
from diffpress.export.graph.model import Graph, save_graph, write_view

VIEW, DATA = "model.onnx", "model.onnx_data"


def write_graph(graph: Graph, folder: Path, name: str, part: str, config: dict[str, Any]) -> int:
    """Write `folder`/<name>.onnx, and `folder`/<part>/model.onnx with its config over the same weights.

    Returns the bytes of graph and weights.
    """
    home = folder / part
    home.mkdir(exist_ok=True)
    size = save_graph(graph, folder / f"{name}.onnx", data=f"{part}/{DATA}")
    write_view(folder / f"{name}.onnx", home / VIEW)
    (home / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return size


def link_graph(source: Path, folder: Path, name: str) -> None:
    """Give `folder` the files that `write_graph` made for a part of another bundle, as hard links where possible."""
    link_or_copy(str(source / f"{name}.onnx"), str(folder / f"{name}.onnx"))
    shutil.copytree(source / name, folder / name, copy_function=link_or_copy)


def write_pipeline_files(layout: Layout, folder: Path) -> None:
    """Write index, scheduler and tokenizers of the checkpoint's pipeline into a bundle's folder."""
    if layout.index:
        (folder / INDEX).write_text(json.dumps(_index(layout.index), indent=2, sort_keys=True) + "\n")
    if (layout.folder / "scheduler").is_dir():
        (folder / "scheduler").mkdir()
        file = layout.folder / "scheduler" / "scheduler_config.json"
        shutil.copyfile(file, folder / "scheduler" / file.name)
    for _, part in layout.encoders:
        _write_tokenizer(layout, part, folder / part)


def _index(index: dict[str, Any]) -> dict[str, Any]:
    """The index without parts that are not in the bundle; nobody is warned of a safety checker that is not there."""
    kept = {}
    for name, entry in index.items():
        is_component = isinstance(entry, list) and len(entry) == 2
        kept[name] = [None, None] if is_component and name not in USED else entry
    return kept | ({"requires_safety_checker": False} if "safety_checker" in index else {})


def _write_tokenizer(layout: Layout, part: str, target: Path) -> None:
    """tokenizer.json as the loaded tokenizer has it (a stored one may lack what its configuration adds), the vocabulary
    files as stored, and those of a CLIP tokenizer that was stored as tokenizer.json alone.
    """
    tokenizer = layout.tokenizer(part)
    target.mkdir()
    tokenizer.save_pretrained(target)
    for file in sorted((layout.folder / part).iterdir()):
        if file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    model = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if model.get("type") == "BPE" and not (target / "vocab.json").exists():
        tokenizer.backend_tokenizer.model.save(str(target))
