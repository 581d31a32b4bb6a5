"""Files that make a bundle readable by other tools: a pipeline folder of ONNX graphs, as in optimum.

model_index.json, scheduler/          as in the checkpoint, without components that sampling does not need
tokenizer*/                           tokenizer.json for our runtime; vocabulary and merges for slow tokenizers
unet/model.onnx, config.json          a second small graph file that refers to the same weights as denoiser.onnx
unet/model.onnx_data                  the weights, stored once
vae_decoder/, text_encoder*/          likewise
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffpress.compress.sources.layout import INDEX, USED, Layout
from diffpress.export.graph.model import Graph, save_graph, write_linked_graph
from diffpress.runtime.io.files import link_or_copy

VIEW, DATA = "model.onnx", "model.onnx_data"


def write_graph(graph: Graph, folder: Path, name: str, component: str, config: dict[str, Any]) -> int:
    """Write `folder`/<name>.onnx, and <component>/model.onnx with its config over the same weights.

    Returns:
        The size of graph and weights in bytes.
    """
    home = folder / component
    home.mkdir(exist_ok=True)
    size = save_graph(graph, folder / f"{name}.onnx", data=f"{component}/{DATA}")
    write_linked_graph(folder / f"{name}.onnx", home / VIEW)
    (home / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return size


def link_graph(source: Path, folder: Path, name: str) -> None:
    """Link (or copy) the files that `write_graph` wrote for a component of another bundle into `folder`."""
    link_or_copy(str(source / f"{name}.onnx"), str(folder / f"{name}.onnx"))
    shutil.copytree(source / name, folder / name, copy_function=link_or_copy)


def write_pipeline_files(layout: Layout, folder: Path) -> None:
    """Write the pipeline's index, scheduler and tokenizers into a bundle's folder."""
    if layout.index:
        (folder / INDEX).write_text(json.dumps(_index(layout.index), indent=2, sort_keys=True) + "\n")
    if (layout.folder / "scheduler").is_dir():
        (folder / "scheduler").mkdir()
        file = layout.folder / "scheduler" / "scheduler_config.json"
        shutil.copyfile(file, folder / "scheduler" / file.name)
    for _, component in layout.encoders:
        _write_tokenizer(layout, component, folder / component)


def _index(index: dict[str, Any]) -> dict[str, Any]:
    """Return the index without components that the bundle lacks and without the safety checker warning."""
    kept = {}
    for name, entry in index.items():
        is_component = isinstance(entry, list) and len(entry) == 2
        kept[name] = [None, None] if is_component and name not in USED else entry
    return kept | ({"requires_safety_checker": False} if "safety_checker" in index else {})


def _write_tokenizer(layout: Layout, component: str, target: Path) -> None:
    """Write a tokenizer's files.

    tokenizer.json is saved from the loaded tokenizer (a stored one may lack what its configuration adds). Vocabulary
    files are copied, or extracted for a CLIP tokenizer that was stored as tokenizer.json alone.
    """
    tokenizer = layout.tokenizer(component)
    target.mkdir()
    tokenizer.save_pretrained(target)
    for file in sorted((layout.folder / component).iterdir()):
        if file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    model = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if model.get("type") == "BPE" and not (target / "vocab.json").exists():
        tokenizer.backend_tokenizer.model.save(str(target))
