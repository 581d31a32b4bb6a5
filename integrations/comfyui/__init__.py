"""ComfyUI nodes that load a diffpress bundle and sample images from it; README.md describes how to install them."""

from __future__ import annotations

try:
    from .nodes import LoadBundle, SampleBundle
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "diffpress":
        raise
    raise ImportError(
        "the diffpress nodes need the package 'diffpress' in ComfyUI's Python: pip install 'diffpress[openvino,text]'"
    ) from error

# names in saved workflows: they are never changed
NODE_CLASS_MAPPINGS = {"DiffpressLoadBundle": LoadBundle, "DiffpressSample": SampleBundle}
NODE_DISPLAY_NAME_MAPPINGS = {"DiffpressLoadBundle": "diffpress: load bundle", "DiffpressSample": "diffpress: sample"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
