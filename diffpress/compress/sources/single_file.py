"""Convert a .safetensors file in the original (CompVis, Stability, BFL) layout to a pipeline folder.

diffusers ignores some markers of a file: empty tensors or header metadata that name the prediction type.
"""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import write_folder
from diffpress.compress.sources.layout import first_line
from diffpress.compress.sources.pretrained import quiet_libraries
from diffpress.compress.sources.weights import (
    PICKLES,
    header_metadata,
    refuse_quantized,
    tensor_shapes,
    unread_tensors,
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
# parts of a file that diffusers converts completely, so that a tensor left over means another architecture
CONVERTED = ("model.diffusion_model.", "first_stage_model.")
TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
# tensors of training that have no part in sampling: losses, averaged copies, tables of the noise schedule
TRAINING = re.compile(
    r"^(first_stage_model\.(loss|model_ema)\.|model_ema\.|denoiser\.sigmas$|log_one_minus_|sqrt_|posterior_|"
    r"(alphas_cumprod|betas|logvar|lvlb_weights|scale_factor|global_step))"
)


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
    pipe, source = _converted(file, tensors, config)
    for component, model in pipe.components.items():
        if isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters()):
            raise InvalidInputError(f"{file}: weights of {component} are missing (config from {source})")
    _check_all_read(file, tensors, pipe)
    _set_prediction_(pipe, file, tensors, source)
    with quiet_libraries():
        write_folder(into, lambda temporary: pipe.save_pretrained(temporary, safe_serialization=True))
    return into


def _converted(file: Path, tensors: dict[str, torch.Tensor], config: str | None) -> tuple[Any, str]:
    """Return the file as a pipeline of diffusers, and where its configs are from."""
    import diffusers
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    kind = infer_diffusers_model_type(tensors)
    if kind == "v1" and not any(name.startswith("model.diffusion_model.") for name in tensors):
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
        with quiet_libraries():
            return pipeline.from_single_file(str(file), config=source, local_files_only=local), source
    except Exception as error:  # torch, transformers and diffusers raise many types for a mismatched file
        raise InvalidInputError(
            f"{file}: diffusers cannot load it as {name} with the configs of {source} ({first_line(error)}); "
            "components missing from the file are read from --config FOLDER"
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


def _check_all_read(file: Path, tensors: dict[str, torch.Tensor], pipe: Any) -> None:
    """Refuse a tensor of the network that diffusers did not convert; warn of tensors of unknown meaning."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known = {V_PREDICTION, ZERO_SNR}
    rest = {name: tensor for name, tensor in tensors.items() if name not in known and not TRAINING.match(name)}
    for model in pipe.components.values():
        entry: Any = SINGLE_FILE_LOADABLE_CLASSES.get(type(model).__name__)
        if entry is None:
            continue
        expected = model.state_dict().keys()

        def convert(
            state: dict[str, torch.Tensor], model: Any = model, entry: Any = entry, expected: Any = expected
        ) -> list[torch.Tensor]:
            found = entry["checkpoint_mapping_fn"](config=dict(model.config), checkpoint=state)
            return [tensor for name, tensor in found.items() if name in expected and tensor is not None]

        if not expected <= rest.keys():  # else the file has diffusers' own names
            unread = set(unread_tensors(rest, convert))
            rest = {name: tensor for name, tensor in rest.items() if name in unread}
    unknown = sorted(name for name in rest if not name.startswith(TEXT))
    if unknown and unknown[0].startswith(CONVERTED):
        raise InvalidInputError(
            f"{file}: tensor '{unknown[0]}' does not belong to this {type(pipe).__name__} ({len(unknown)} in all); is "
            "it another architecture?"
        )
    if unknown:
        logger.warning(f"{file}: tensor '{unknown[0]}' is unknown and not used ({len(unknown)} in all)")


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
