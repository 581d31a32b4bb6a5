"""The folder of target `genai`: the bundle's graphs in OpenVINO's format, in the layout of optimum-intel.

    genai/model_index.json, scheduler/scheduler_config.json
    genai/tokenizer*/openvino_tokenizer.xml         made by openvino_tokenizers
    genai/text_encoder*/, unet/ or transformer/, vae_decoder/     openvino_model.xml, openvino_model.bin, config.json
    genai/generate.json                             arguments of `generate`, which GenAI does not read from a folder

GenAI passes integer timesteps to U-Nets. Everything else is as in the ONNX files, quantized layers and the order
of the outputs included.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.sources.layout import INDEX, Layout, read_layout
from diffpress.export.targets.genai.schedulers import GenaiPlan
from diffpress.runtime.io.files import write_json

FOLDER = "genai"
MODEL, TOKENIZER = "openvino_model.xml", "openvino_tokenizer.xml"
ARGUMENTS = "generate.json"
COUNTED = re.compile(r"[A-Z]\w*_\d+(\.\d+)?")  # a name that OpenVINO makes of a kind and a number


@dataclass(frozen=True)
class GenaiInputs:
    """How GenAI passes a denoiser's inputs: the type of the timestep, and the name of the sample."""

    timestep: str = "i64"
    sample: str = "sample"


PIPELINES = {
    "StableDiffusionPipeline": GenaiInputs(),
    "StableDiffusionXLPipeline": GenaiInputs(),
    "LatentConsistencyModelPipeline": GenaiInputs(),
    "StableDiffusion3Pipeline": GenaiInputs("f32", "hidden_states"),
}


def write_genai_folder(
    checkpoint: Checkpoint, plan: GenaiPlan, graphs: Mapping[str, Path], folder: Path
) -> dict[str, Any]:
    """Write the folder into a bundle's `folder` and return its manifest entry.

    Args:
        checkpoint: The exported checkpoint.
        plan: The plan that GenAI samples with.
        graphs: Component -> its ONNX file in the bundle; 'denoiser' is the graph that OpenVINO runs.
        folder: The bundle's folder.
    """
    import openvino as ov

    source, spec = checkpoint.source, checkpoint.spec
    assert source.pipeline_folder is not None  # genai/target.py
    layout = read_layout(source.pipeline_folder)
    home = folder / FOLDER
    home.mkdir()
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    write_json(home / INDEX, index | {"scheduler": ["diffusers", plan.config["_class_name"]]})
    (home / "scheduler").mkdir()
    write_json(home / "scheduler" / "scheduler_config.json", plan.config)
    inputs = PIPELINES[str(layout.pipeline)]
    for name, graph in graphs.items():
        component = source.folder if name == "denoiser" else name
        target = home / component
        target.mkdir()
        config = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
        write_json(target / "config.json", config)
        model = ov.Core().read_model(graph)
        _save(_with_inputs(model, inputs) if name == "denoiser" else model, target / MODEL)
    for _, component in layout.encoders:
        (home / component).mkdir()
        _write_tokenizer(layout, component, home / component)
    height, width = spec.image_size
    arguments = {
        "num_inference_steps": plan.plan.steps,
        "guidance_scale": plan.plan.guidance,
        "height": height,
        "width": width,
    }
    write_json(home / ARGUMENTS, arguments)
    return {
        "folder": FOLDER,
        "scheduler": plan.config["_class_name"],
        "arguments": arguments,
        **({"not_followed": list(plan.changes)} if plan.changes else {}),
    }


def _with_inputs(model: Any, inputs: GenaiInputs) -> Any:
    """Return the denoiser as an OpenVINO model with the inputs that GenAI passes."""
    import openvino as ov
    from openvino.preprocess import PrePostProcessor

    converted = PrePostProcessor(model)
    converted.input("timestep").tensor().set_element_type(getattr(ov.Type, inputs.timestep))
    model = converted.build()
    model.input("sample").get_tensor().set_names({inputs.sample})
    if any("guidance" in value.get_names() for value in model.inputs):
        _embed_guidance_outside_(model)
    return model


def _embed_guidance_outside_(model: Any) -> None:
    """Replace the input `guidance` by its embedding, `timestep_cond`, which GenAI computes."""
    import openvino as ov
    from openvino import opset13

    is_projection = (op for op in model.get_ordered_ops() if "cond_proj" in op.get_friendly_name() and op.inputs())
    projection = next(op for op in is_projection if op.get_type_name() == "MatMul")
    width = projection.input_value(0).get_partial_shape()[1]
    embedding = opset13.parameter(ov.PartialShape([-1, width]), ov.Type.f32, name="timestep_cond")
    embedding.output(0).get_tensor().set_names({"timestep_cond"})
    projection.input(0).replace_source_output(embedding.output(0))
    model.add_parameters([embedding])
    model.remove_parameter(model.input("guidance").get_node())


def _write_tokenizer(layout: Layout, component: str, target: Path) -> None:
    """Convert a tokenizer; GenAI pads its ids to the length of the text encoder."""
    import openvino_tokenizers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about slow tokenizers
        tokenizer = openvino_tokenizers.convert_tokenizer(layout.tokenizer(component), with_detokenizer=False)
    _save(tokenizer, target / TOKENIZER)


def _save(model: Any, file: Path) -> None:
    """Write a model in float32; the names that OpenVINO counts over a process are made those of the position."""
    import openvino as ov

    for index, node in enumerate(model.get_ordered_ops()):
        name, kind = node.get_friendly_name(), node.get_type_name()
        if not COUNTED.fullmatch(name):
            continue
        node.set_friendly_name(f"{kind}_{index}")
        for output in node.outputs():
            if name in output.get_names():
                output.get_tensor().set_names({f"{kind}_{index}"})
    ov.save_model(model, file, compress_to_fp16=False)
