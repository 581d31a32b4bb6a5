"""Convert a .safetensors file in the original (CompVis, Stability, BFL) layout to a pipeline folder.

diffusers ignores some markers of a file: empty tensors or header metadata that name the prediction type. It also drops
tensors that its configs have no place for; here they are refused by name, and so are missing ones.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch

from diffpress.compress.checkpoint import write_folder
from diffpress.compress.sources.layout import TEXT_ENCODERS, first_line
from diffpress.compress.sources.pretrained import quiet_libraries
from diffpress.compress.sources.single_file_components import (
    components_outside,
    empty_components,
    missing_parameters,
    unread_by_models,
)
from diffpress.compress.sources.single_file_text import unread_text_tensors
from diffpress.compress.sources.terms import stated_terms, write_terms
from diffpress.compress.sources.weights import (
    PICKLES,
    header_metadata,
    refuse_quantized,
    tensor_shapes,
)
from diffpress.runtime.errors import InvalidInputError

logger = logging.getLogger(__name__)

# marker tensors that ComfyUI and Forge read: v-prediction, and betas rescaled to a zero terminal SNR
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
# markers of models that predict in EDM's parameterization
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# entry of the header's metadata that training tools write, and its values
PREDICTION_ENTRY = "modelspec.prediction_type"
PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}
# components that diffusers converts completely, so that a tensor left over means another architecture
CONVERTED = ("model.diffusion_model.", "first_stage_model.")


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
        InvalidInputError: diffusers does not recognize the file, or the file is incomplete, quantized or says something
            that cannot be followed.
    """
    if file.suffix != ".safetensors":
        reason = "pickles can run arbitrary code and are not loaded" if file.suffix in PICKLES else "unknown file type"
        raise InvalidInputError(f"{file}: {reason}; a single-file checkpoint must be a .safetensors file")
    if not file.is_file():
        raise InvalidInputError(f"{file}: no such file")
    refuse_quantized(file)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(file).items()}
    _refuse_unsupported_markers(file, tensors)
    index, source = _described(file, tensors, config)
    models = empty_components(index, source)
    outside = components_outside(file, tensors, models, source)
    _check_tensors(file, tensors, {name: model for name, model in models.items() if name not in outside}, source)
    pipe = _loaded(file, index, source, outside)
    for component in models.keys() - outside.keys():
        missing = sorted(name for name, value in getattr(pipe, component).named_parameters() if value.is_meta)
        if missing:
            raise InvalidInputError(missing_parameters(file, component, missing, source))
    _set_prediction_(pipe, file, tensors, source)

    def fill(temporary: Path) -> None:
        pipe.save_pretrained(temporary, safe_serialization=True)
        write_terms(stated_terms(header_metadata(file)), temporary)

    with quiet_libraries():
        write_folder(into, fill)
    return into


def _described(file: Path, tensors: dict[str, torch.Tensor], config: str | None) -> tuple[dict[str, Any], str]:
    """Return model_index.json of the file's pipeline, and the folder or hub id that it is from."""
    import diffusers
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    kind = infer_diffusers_model_type(tensors)
    if kind == "v1" and not any(name.startswith("model.diffusion_model.") for name in tensors):
        # diffusers returns v1 for every file that it does not recognize
        raise InvalidInputError(
            f"{file}: not in a single-file layout that diffusers recognizes; use a pipeline folder instead"
        )
    source = config or DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    try:
        index = dict(diffusers.DiffusionPipeline.load_config(source, local_files_only=Path(source).is_dir()))
        name = str(index["_class_name"])
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise InvalidInputError(
            f"{file}: detected as type '{kind}', but its configs could not be read from {source} "
            f"({first_line(error)}); pass --config FOLDER, a diffusers pipeline folder of the same family, "
            "to do without the hub"
        ) from error
    if not hasattr(getattr(diffusers, name, None), "from_single_file"):
        raise InvalidInputError(f"{source}: diffusers cannot load {name} from a single file")
    return index, source


def _loaded(file: Path, index: dict[str, Any], source: str, outside: dict[str, Any]) -> Any:
    """Return the file as a pipeline of diffusers, with the components that it does not hold."""
    import diffusers

    name = index["_class_name"]
    try:
        with quiet_libraries():
            return getattr(diffusers, name).from_single_file(
                str(file), config=source, local_files_only=Path(source).is_dir(), **outside
            )
    except Exception as error:  # torch, transformers and diffusers raise many types for a mismatched file
        raise InvalidInputError(
            f"{file}: diffusers cannot load it as {name} with the configs of {source} ({first_line(error)})"
        ) from error


def _refuse_unsupported_markers(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name in EDM:
        if name in tensors:
            raise InvalidInputError(f"{file}: tensor '{name}' marks a model in EDM's parameterization: not supported")
    if ZERO_SNR in tensors and V_PREDICTION not in tensors:
        raise InvalidInputError(
            f"{file}: tensor '{ZERO_SNR}' marks a zero terminal SNR, which needs v-prediction, but there is no tensor "
            f"'{V_PREDICTION}'; is the file complete?"
        )


def _check_tensors(file: Path, tensors: dict[str, torch.Tensor], models: dict[str, Any], source: str) -> None:
    """Refuse a tensor that a component lacks, or has besides its own; warn of tensors of unknown meaning."""
    encoders = [model for component, model in models.items() if component in TEXT_ENCODERS]
    others = {component: model for component, model in models.items() if component not in TEXT_ENCODERS}
    rest = unread_by_models(file, tensors, others, source)
    of_text, unread = unread_text_tensors(rest, encoders)
    unread = sorted(set(unread) - {V_PREDICTION, ZERO_SNR})
    foreign = sorted([*of_text, *(name for name in unread if name.startswith(CONVERTED))])
    if foreign:
        raise InvalidInputError(
            f"{file}: tensor '{foreign[0]}' does not belong to the model that {source} describes ({len(foreign)} in "
            "all); is it another architecture?"
        )
    if unread:
        logger.warning(f"{file}: tensor '{unread[0]}' is unknown and not used ({len(unread)} in all)")


def _set_prediction_(pipe: Any, file: Path, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Set the scheduler to the prediction type that the file's markers name, as ComfyUI and Forge do.

    Raises:
        InvalidInputError: The scheduler has no such setting, or the file's metadata names another prediction type.
    """
    scheduler = pipe.scheduler
    if V_PREDICTION not in tensors:
        stated = header_metadata(file).get(PREDICTION_ENTRY, "").lower()
        current = scheduler.config.get("prediction_type", "epsilon")
        if PREDICTIONS.get(stated, current) != current:
            raise InvalidInputError(
                f"{file}: its metadata has {PREDICTION_ENTRY} = '{stated}', but the scheduler of {source} has "
                f"prediction_type '{current}'; pass --config FOLDER with the right one"
            )
        return
    settings: dict[str, Any] = {"prediction_type": "v_prediction"}
    if ZERO_SNR in tensors:
        settings["rescale_betas_zero_snr"] = True
    for setting in settings:
        if setting not in inspect.signature(type(scheduler).__init__).parameters:
            raise InvalidInputError(
                f"{file}: its marker tensors need {setting}, which the {type(scheduler).__name__} of {source} does not "
                "have; pass --config FOLDER with another scheduler, such as EulerDiscreteScheduler"
            )
    pipe.scheduler = type(scheduler).from_config(scheduler.config, **settings)
