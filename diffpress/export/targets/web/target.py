"""Target web: web/ in a bundle, a folder of static files that a file server or a page host delivers.

index.html page.css page.js       the page
sampler.js worker.js noise.js tokenizer.js      its modules; sampler.js is what another page imports
sampler.onnx sampler.json tokenizer*/           the bundle's (target sampler)
ort/                              ONNX Runtime Web
"""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from typing import Any

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import ExportConfig
from diffpress.compress.sources.layout import read_layout
from diffpress.export.targets.sampler.target import DESCRIPTION, SAMPLER
from diffpress.export.targets.web.onnxruntime_web import copy_web_runtime, find_web_runtime
from diffpress.export.targets.web.tokenizer_check import check_tokenizer
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError

TARGET = FOLDER = "web"
TOKENIZER = "tokenizer.json"


def check_web(checkpoint: Checkpoint, config: ExportConfig) -> None:
    """Check before any work that a page can sample a model, if that is a target.

    Raises:
        InvalidInputError: The page has no fields for its conditioning or no tokenizer for its prompts, or there is no
            ONNX Runtime Web.
    """
    if TARGET not in config.targets:
        return
    conditioning, source = checkpoint.spec.conditioning, checkpoint.source
    if conditioning.kind == "tensors":
        names = ", ".join(conditioning.tensors)
        raise InvalidInputError(f"target web: the page has no fields for tensors ({names}); use target sampler")
    find_web_runtime(config.web_runtime)
    if source.pipeline_folder is not None:
        layout = read_layout(source.pipeline_folder)
        for name in {encoder.tokenizer for encoder in conditioning.encoders}:
            check_tokenizer(name, json.loads(layout.tokenizer(name).backend_tokenizer.to_str()))


def web_content(bundle: Bundle, config: ExportConfig) -> dict[str, Any]:
    """Write the folder of a bundle that is not sealed yet and has a sampler, if that is a target.

    Args:
        bundle: The bundle, with sampler.onnx in its folder.
        config: Settings of the export.

    Returns:
        What the manifest gets: `web` {folder, onnxruntime_web, bytes}.

    Raises:
        InvalidInputError: The graph is too large for a browser.
    """
    if TARGET not in config.targets:
        return {}
    if (bundle.path / f"{SAMPLER}.data").exists():
        raise InvalidInputError(
            f"target web: {SAMPLER} has more than 2 GiB, which browsers do not load; quantize first"
        )
    folder, runtime = bundle.path / FOLDER, find_web_runtime(config.web_runtime)
    with as_file(files("diffpress.export.targets.web") / "page") as page:
        shutil.copytree(page, folder)
    for name in (SAMPLER, DESCRIPTION):
        shutil.copyfile(bundle.path / name, folder / name)
    for name in {encoder.tokenizer for encoder in bundle.spec.conditioning.encoders}:
        (folder / name).mkdir(parents=True)
        shutil.copyfile(bundle.path / name / TOKENIZER, folder / name / TOKENIZER)
    copy_web_runtime(runtime, folder / "ort")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"web": {"folder": FOLDER, "onnxruntime_web": runtime.version, "bytes": size}}


def web_line(entry: dict[str, Any]) -> str:
    """Return the manifest's entry as a line of the summary."""
    size = entry["bytes"] / 2**20
    return f"{entry['folder']}/: {size:.1f} MiB with ONNX Runtime Web {entry['onnxruntime_web']}, for any file server"
