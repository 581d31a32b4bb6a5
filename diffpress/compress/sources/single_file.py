"""Convert a .safetensors file in the original (CompVis, Stability, BFL) layout to a pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import write_folder
from diffpress.compress.sources.layout import PICKLES, first_line
from diffpress.compress.sources.tensor_shapes import tensor_shapes
from diffpress.runtime.errors import InvalidInputError


def from_single_file(file: Path, into: Path, config: str | None = None) -> Path:
    """Convert a single .safetensors file in the original layout to a pipeline folder.

    Args:
        file: The .safetensors file.
        into: Output folder.
        config: Pipeline folder or hub id of the same family; by default diffusers detects the model type and fetches
            its configs from the hub.

    Returns:
        `into`.

    Raises:
        InvalidInputError: diffusers does not recognize the file, or the file is incomplete.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    if file.suffix != ".safetensors":
        reason = "pickles can run arbitrary code and are not loaded" if file.suffix in PICKLES else "unknown file type"
        raise InvalidInputError(f"{file}: {reason}; a single-file checkpoint must be a .safetensors file")
    if not file.is_file():
        raise InvalidInputError(f"{file}: no such file")
    shapes = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(file).items()}
    kind = infer_diffusers_model_type(shapes)
    if kind == "v1" and not any(name.startswith("model.diffusion_model.") for name in shapes):
        # diffusers returns v1 for every file that it does not recognize
        raise InvalidInputError(
            f"{file}: not in a single-file layout that diffusers recognizes; use a pipeline folder instead"
        )
    source = config or DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    local = Path(source).is_dir()
    try:
        name = str(diffusers.DiffusionPipeline.load_config(source, local_files_only=local)["_class_name"])
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise InvalidInputError(
            f"{file}: detected as type '{kind}', but its configs could not be read from {source} "
            f"({first_line(error)}); pass --config FOLDER, a diffusers pipeline folder of the same family, "
            "to do without the hub"
        ) from error
    pipeline: Any = getattr(diffusers, name, None)
    if not hasattr(pipeline, "from_single_file"):
        raise InvalidInputError(f"{source}: diffusers cannot load {name} from a single file")
    try:
        pipe = pipeline.from_single_file(str(file), config=source, local_files_only=local)
    except Exception as error:  # torch, transformers and diffusers raise many types for a mismatched file
        raise InvalidInputError(
            f"{file}: diffusers cannot load it as {name} with the configs of {source} ({first_line(error)}); "
            "components missing from the file are read from --config FOLDER"
        ) from error
    for component, model in pipe.components.items():
        if isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters()):
            raise InvalidInputError(f"{file}: weights of {component} are missing (config from {source})")
    write_folder(into, lambda temporary: pipe.save_pretrained(temporary, safe_serialization=True))
    return into
