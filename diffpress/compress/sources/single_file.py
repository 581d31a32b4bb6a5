"""One .safetensors file in the original (CompVis, Stability, BFL) layout -> a pipeline folder."""

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
    """Write a single .safetensors file in the original layout as a pipeline folder into `into`.

    `config`: a pipeline folder of the same family, or its hub id. Without one diffusers fetches the configs of the
    type that it detects from the hub. Raises InvalidInputError for a file that diffusers does not know.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    if file.suffix != ".safetensors":
        why = "a pickle can run any code when read, so diffpress does not" if file.suffix in PICKLES else "not known"
        raise InvalidInputError(f"{file}: {why}; a single file is a .safetensors file")
    if not file.is_file():
        raise InvalidInputError(f"{file}: no such file")
    shapes = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(file).items()}
    kind = infer_diffusers_model_type(shapes)
    if kind == "v1" and not any(name.startswith("model.diffusion_model.") for name in shapes):
        # what diffusers calls every file that it does not recognise
        raise InvalidInputError(
            f"{file}: not in an original layout that diffusers knows; give a pipeline folder instead"
        )
    source = config or DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    local = Path(source).is_dir()
    try:
        name = str(diffusers.DiffusionPipeline.load_config(source, local_files_only=local)["_class_name"])
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise InvalidInputError(
            f"{file}: a model of type '{kind}', whose configs {source} did not give ({first_line(error)}); "
            "--config FOLDER, a diffusers pipeline folder of the same family, needs no hub"
        ) from error
    pipeline: Any = getattr(diffusers, name, None)
    if not hasattr(pipeline, "from_single_file"):
        raise InvalidInputError(f"{source}: diffusers makes no {name} from a single file")
    try:
        pipe = pipeline.from_single_file(str(file), config=source, local_files_only=local)
    except Exception as error:  # torch, transformers and diffusers raise many types for a file that does not fit
        raise InvalidInputError(
            f"{file}: diffusers makes no {name} from it with the configs of {source} ({first_line(error)}); "
            "a part that the file lacks is read from --config FOLDER, where that has it"
        ) from error
    for part, model in pipe.components.items():
        if isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters()):
            raise InvalidInputError(f"{file}: lacks weights of {part}, as {source} describes it")
    write_folder(into, lambda temporary: pipe.save_pretrained(temporary, safe_serialization=True))
    return into
