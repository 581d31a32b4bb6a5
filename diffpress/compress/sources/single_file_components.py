"""Components of a single-file checkpoint, checked before any weight is read: which tensors belong to which component.

The components are built without weights from the configs of a pipeline. diffusers converts the tensors' names; here
that is done on the meta device, to find what is missing, of another shape, or read by no component.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffpress.compress.sources.layout import DECODERS, DENOISERS, TEXT_ENCODERS, first_line
from diffpress.compress.sources.pretrained import quiet_libraries
from diffpress.compress.sources.single_file_text import has_text_encoder
from diffpress.compress.sources.weights import unread_tensors
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import link_or_copy

Tensors = dict[str, torch.Tensor]

DECODER = ("first_stage_model.", "vae.")  # start of the names of a decoder's tensors
# tensors of training that have no part in sampling: losses, averaged copies, tables of the noise schedule
TRAINING = re.compile(
    r"^(first_stage_model\.(loss|model_ema)\.|model_ema\.|denoiser\.sigmas$|log_one_minus_|sqrt_|posterior_|"
    r"(alphas_cumprod|betas|logvar|lvlb_weights|scale_factor|global_step))"
)


def empty_components(index: dict[str, Any], source: str) -> dict[str, Any]:
    """Build the models of a pipeline on the meta device.

    Args:
        index: The pipeline's model_index.json.
        source: Folder or hub id of its configs.

    Raises:
        InvalidInputError: A component cannot be built.
    """
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    models: dict[str, Any] = {}
    for component in (*DENOISERS, *DECODERS, *TEXT_ENCODERS):
        entry = index.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in libraries:
            continue
        library, kind = entry
        options: dict[str, Any] = {"subfolder": component, "local_files_only": Path(source).is_dir()}
        try:
            cls = getattr(libraries[library], kind)
            with quiet_libraries(), init_empty_weights():
                if library == "diffusers":
                    models[component] = cls.from_config(cls.load_config(source, **options))
                else:
                    models[component] = cls(cls.config_class.from_pretrained(source, **options))
        except Exception as error:  # the libraries and the hub client raise many types
            raise InvalidInputError(
                f"{source}: {component}: {kind} cannot be built from its config ({first_line(error)})"
            ) from error
    return models


def components_outside(file: Path, tensors: Tensors, models: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the models that the file does not hold; to save one links the files of its folder in `source`.

    They are checked when they are loaded, like those of every folder.

    Raises:
        InvalidInputError: `source` has no weights of them.
    """
    outside = {component: model for component, model in models.items() if not _is_inside(tensors, component, model)}
    for component, model in outside.items():
        folder = Path(source) / component
        if not any(folder.glob("*.safetensors")):
            raise InvalidInputError(
                f"{file}: has no {component}, and {source} has no weights of it; pass --config FOLDER, a pipeline "
                "folder with this component"
            )
        model.save_pretrained = _linked(folder)
    return outside


def _is_inside(tensors: Tensors, component: str, model: Any) -> bool:
    if component in DENOISERS:
        return True
    if component in TEXT_ENCODERS:
        return has_text_encoder(tensors, type(model).__name__)
    return any(name.startswith(DECODER) for name in tensors)


def _linked(folder: Path) -> Any:
    def save_pretrained(into: str) -> None:
        shutil.copytree(folder, into, copy_function=link_or_copy)

    return save_pretrained


def unread_by_models(file: Path, tensors: Tensors, models: dict[str, Any], source: str) -> Tensors:
    """Return the tensors that no denoiser or decoder is converted from, except those of training.

    Raises:
        InvalidInputError: A tensor of these models is missing or has another shape.
    """
    rest = {name: tensor for name, tensor in tensors.items() if not TRAINING.match(name)}
    for component, model in models.items():
        expected = model.state_dict().keys()
        if expected <= tensors.keys():  # the file has diffusers' own names
            _check(file, component, {name: tensors[name] for name in expected}, model, source)
            rest = {name: tensor for name, tensor in rest.items() if name not in expected}
            continue
        converted = partial(_converted, file, component, model, source)
        _check(file, component, converted(dict(tensors)), model, source)
        rest = _unread(rest, converted)
    return rest


def _unread(tensors: Tensors, convert: Callable[[Tensors], Tensors]) -> Tensors:
    names = unread_tensors(tensors, lambda state: convert(state).values())
    return {name: tensors[name] for name in names}


def _converted(file: Path, component: str, model: Any, source: str, state: Tensors) -> Tensors:
    """Return the tensors of a model, by their names in diffusers, that diffusers makes of those of a file."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    expected, kind = model.state_dict().keys(), type(model).__name__
    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise InvalidInputError(f"{file}: diffusers cannot load {component}, {kind}, from a single file")
    entry: Any = SINGLE_FILE_LOADABLE_CLASSES[kind]
    try:
        found = entry["checkpoint_mapping_fn"](config=dict(model.config), checkpoint=state)
    except Exception as error:  # KeyError and others, for a tensor that is missing
        raise InvalidInputError(
            f"{file}: {component} is incomplete, or of another architecture than the config in {source} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    return {name: tensor for name, tensor in found.items() if name in expected and tensor is not None}


def _check(file: Path, component: str, found: Tensors, model: Any, source: str) -> None:
    missing = sorted(name for name, _ in model.named_parameters() if name not in found)
    if missing:
        raise InvalidInputError(missing_parameters(file, component, missing, source))
    for name, tensor in model.state_dict().items():
        if name in found and found[name].shape != tensor.shape:
            raise InvalidInputError(
                f"{file}: tensor '{name}' of {component} has shape {list(found[name].shape)}, the config in {source} "
                f"requires {list(tensor.shape)}"
            )


def missing_parameters(file: Path, component: str, names: list[str], source: str) -> str:
    """Return the message for parameters of a component that the file does not have."""
    return (
        f"{file}: tensor '{names[0]}' of {component} is missing ({len(names)} in all; config from {source}); copy the "
        "file again, or pass the --config FOLDER that fits it"
    )
