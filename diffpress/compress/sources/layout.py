"""The diffusers layout on disk: locate the denoiser, read the components' configs and classes, open tokenizers.

    model_index.json                       the pipeline's class and the class of every component
    unet/ or transformer/                  config.json + safetensors (one file, or shards with an index)
    vae/ or vqvae/, text_encoder*/         the same
    tokenizer*/, scheduler/                files

Without model_index.json the components are those whose folders exist; a bare unet/ folder is a denoiser alone.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import link_or_copy, read_json

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
DECODERS = ("vae", "vqvae")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
USED = (*DENOISERS, *DECODERS, *TEXT_ENCODERS, *TOKENIZERS, "scheduler")
# (old class, norm_type) -> present class, as diffusers maps older folders
RENAMED = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}
# complete models that published folders name in the config of the encoder that diffusers loads from them
ENCODER_OF = {"T5ForConditionalGeneration": "T5EncoderModel", "T5Model": "T5EncoderModel", "CLIPModel": "CLIPTextModel"}
MAX_LAYERS = 1000  # ten times as many as the largest published model has
# settings of a tokenizer that tokenizer.json does not store, and the value that the runtime follows
TOKENIZER_SETTINGS = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "spiece.model",
)  # without one transformers silently builds an empty tokenizer


@dataclass(frozen=True)
class Layout:
    """Layout of a pipeline folder.

    Attributes:
        folder: The pipeline folder.
        denoiser: The denoiser's folder.
        config: The denoiser's config.json.
        index: model_index.json, {} if there is none.
        configs: config.json of the decoder and the text encoders, by component name.
        ignored: Components that sampling does not need, such as a safety checker.
    """

    folder: Path
    denoiser: Path
    config: dict[str, Any]
    index: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Class of the denoiser, under its present name."""
        name = self.class_in_index(self.denoiser.name) or str(self.config.get("_class_name"))
        return RENAMED.get((name, str(self.config.get("norm_type"))), name)

    def kind_of(self, component: str) -> str:
        """Return the class of a decoder or text encoder: the one in the index, which diffusers loads.

        Without an index it is the one in the component's config; of a complete T5 it is the encoder.
        """
        config = self.configs[component]
        in_config = (config.get("architectures") or [config.get("_class_name") or "without a name"])[0]
        return self.class_in_index(component) or ENCODER_OF.get(str(in_config), str(in_config))

    def class_in_index(self, component: str) -> str | None:
        """Return the class of a component in the index, None if it has none.

        It is 'library.Class' if it is not of the library that such components are from; diffusers would look there.
        """
        entry = self.index.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or not entry[1]:
            return None
        library, name = entry
        usual = "transformers" if component in (*TEXT_ENCODERS, *TOKENIZERS) else "diffusers"
        return str(name) if library == usual else f"{library}.{name}"

    @property
    def pipeline(self) -> str:
        """Class of the pipeline, '' if there is no index."""
        return str(self.index.get("_class_name", ""))

    @property
    def decoder(self) -> str | None:
        """Name of the component that decodes latents, None in pixel space."""
        return next((component for component in DECODERS if component in self.configs), None)

    @property
    def encoders(self) -> list[tuple[str, str]]:
        """(text encoder, tokenizer) pairs of the pipeline."""
        return [pair for pair in zip(TEXT_ENCODERS, TOKENIZERS, strict=True) if pair[0] in self.configs]

    def tokenizer(self, component: str) -> Any:
        """Load the transformers tokenizer in the subfolder `component`, of the class that diffusers loads.

        Raises:
            InvalidInputError: It cannot be loaded, or has a setting that the torch-free runtime does not follow.
        """
        import transformers

        folder = self.folder / component
        if not any((folder / name).is_file() for name in VOCABULARIES):
            raise InvalidInputError(f"{folder}: has no {', '.join(VOCABULARIES)}; copy the whole pipeline again")
        name = self.class_in_index(component) or "AutoTokenizer"
        if not hasattr(transformers, name):
            raise InvalidInputError(
                f"{self.folder / INDEX}: {component}: class '{name}' is not one of transformers; name the class of the "
                "published folder"
            )
        try:
            tokenizer = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
        except Exception as error:  # tokenizer classes raise many types
            raise InvalidInputError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error
        for setting, followed in TOKENIZER_SETTINGS.items():
            value = getattr(tokenizer, setting, followed)
            if value != followed:
                file = folder / "tokenizer_config.json"
                raise InvalidInputError(f"{file}: {setting} = {value!r} is not supported, only {followed!r}")
        self._check_textual_inversions(folder, tokenizer)
        return tokenizer

    def _check_textual_inversions(self, folder: Path, tokenizer: Any) -> None:
        """Refuse tokens that the runtime expands (runtime/prompts.py) if the pipeline does not."""
        import diffusers
        from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

        pipeline = getattr(diffusers, self.pipeline, None)
        if pipeline is None or issubclass(pipeline, TextualInversionLoaderMixin):
            return
        for token in tokenizer.added_tokens_encoder:
            if f"{token}_1" in tokenizer.added_tokens_encoder:
                raise InvalidInputError(
                    f"{folder}: token '{token}' is a textual inversion of several vectors, which {self.pipeline} does "
                    "not expand; remove its tokens"
                )


def read_layout(folder: Path) -> Layout:
    """Read the configs of a pipeline folder.

    Raises:
        InvalidInputError: A component that the index lists is missing.
    """
    index = read_json(folder / INDEX, hint="") if (folder / INDEX).is_file() else {}
    denoiser = _denoiser_folder(folder, index)
    config = {key: value for key, value in _read_config(denoiser).items() if not key.startswith("_name_or_path")}
    if denoiser == folder:
        return Layout(folder, denoiser, config)
    listed = [name for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]]
    for name in listed:
        if name in USED and not (folder / name).is_dir():
            raise InvalidInputError(
                f"{folder}: component '{name}' of {INDEX} is missing; copy the whole pipeline again"
            )
    present = listed if index else [name for name in USED if (folder / name).is_dir()]
    configs = {
        name: _read_config(folder / name)
        for name in present
        if name in (*DECODERS, *TEXT_ENCODERS) and name != denoiser.name
    }
    ignored = tuple(name for name in listed if name not in USED)
    return Layout(folder, denoiser, config, index, configs, ignored)


def _read_config(component: Path) -> dict[str, Any]:
    file = component / "config.json"
    config = read_json(file, hint="")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise InvalidInputError(
            f"{file}: quantization_config: the weights are already quantized ({method}); start from the checkpoint in "
            "float32, float16 or bfloat16"
        )
    _check_layers(config, file)
    return config


def _check_layers(config: dict[str, Any], file: Path) -> None:
    """Refuse a config with so many layers that building the module would not end."""
    for key, value in config.items():
        counts = [value] if isinstance(value, int) else value if isinstance(value, list) else []
        if "layers" in key and any(isinstance(count, int) and count > MAX_LAYERS for count in counts):
            raise InvalidInputError(f"{file}: {key} = {value!r}: more than {MAX_LAYERS} layers are not supported")


def _denoiser_folder(folder: Path, index: dict[str, Any]) -> Path:
    for candidate in (*(folder / name for name in DENOISERS), folder):
        if (candidate / "config.json").is_file():
            return candidate
    listed = [name for name in DENOISERS if name in index]
    if listed:
        raise InvalidInputError(
            f"{folder}: component '{listed[0]}' of {INDEX} is missing; copy the whole pipeline again"
        )
    raise InvalidInputError(f"{folder}: has neither unet/config.json nor transformer/config.json nor config.json")


def link_components(source: Path, target: Path, skip: tuple[str, ...]) -> None:
    """Link the files of a pipeline into `target`, except the components in `skip`; copy where links are unsupported.

    Stages change only the denoiser, and the other components can be gigabytes.
    """
    for entry in sorted(source.iterdir()):
        if entry.name in skip or entry.name not in (*USED, INDEX):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, copy_function=link_or_copy)
        else:
            link_or_copy(str(entry), str(target / entry.name))


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
